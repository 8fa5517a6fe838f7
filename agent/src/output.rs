//! What a child of the agent's own says, of which only the end matters.

use tokio::io::{AsyncRead, AsyncReadExt as _};

/// Reads to the end and keeps the last bytes, `bytes_max` at most, as text. Nothing is read from nowhere.
pub(crate) async fn last_text(from: Option<impl AsyncRead + Unpin>, bytes_max: usize) -> String {
    let Some(mut from) = from else { return String::new() };
    let (mut kept, mut buffer) = (Vec::new(), vec![0; 8192]);
    while let Ok(count) = from.read(&mut buffer).await {
        if count == 0 {
            break;
        }
        kept.extend_from_slice(&buffer[..count]);
        if kept.len() > bytes_max {
            kept.drain(..kept.len() - bytes_max);
        }
    }
    String::from_utf8_lossy(&kept).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn keeps_the_end() {
        let long = [vec![b'a'; 100_000], b"the end".to_vec()].concat();
        assert_eq!(last_text(Some(long.as_slice()), 9).await, "aathe end");
        assert_eq!(last_text(Some(&b"short"[..]), 9).await, "short");
        assert_eq!(last_text(None::<&[u8]>, 9).await, "");
    }
}
