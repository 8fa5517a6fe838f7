//! Fetching a blob: from whichever coordinator serves it, resumed where a stream broke, and of use only if its sha256 is right.

use std::io::{self, Write};

use helix_common::sha256::Sha256;
use helix_model::Digest;
use helix_proto::v1;

use crate::connection::{Connection, blobs};
use crate::failure::Failure;

/// Why a blob was not fetched.
pub(crate) enum NotFetched {
    /// It cannot be written here: another blob could not, either.
    Here(io::Error),
    /// The cluster does not give it, or something else in its place.
    There(Failure),
}

impl<F: Into<Failure>> From<F> for NotFetched {
    fn from(failure: F) -> Self {
        Self::There(failure.into())
    }
}

/// Streams a blob into a file; its size, which is known before or learnt. `arrived` is told how many bytes are there.
///
/// What was written of a blob that is not fetched is of no use.
pub(crate) async fn blob(
    connection: &Connection,
    digest: Digest,
    size: Option<u64>,
    file: &mut impl Write,
    arrived: impl Fn(u64),
) -> Result<u64, NotFetched> {
    let (mut hasher, mut offset, mut size) = (Sha256::new(), 0u64, size);
    while size.is_none_or(|size| offset < size) {
        let request = v1::GetBlobRequest { sha256: digest.0.to_vec().into(), offset, length: 0, local: false };
        let call = |channel| {
            let request = request.clone();
            async move { blobs(channel).get_blob(request).await }
        };
        let mut stream = connection.call(call).await?.into_inner();
        loop {
            match stream.message().await {
                Ok(Some(part)) => {
                    size.get_or_insert(part.size);
                    file.write_all(&part.data).map_err(NotFetched::Here)?;
                    hasher.update(&part.data);
                    offset += part.data.len() as u64;
                    arrived(offset);
                    // The first message tells the size alone, and comes from who cannot read the bytes, too.
                    if !part.data.is_empty() {
                        connection.succeeded();
                    }
                }
                Ok(None) if size.is_some_and(|size| offset >= size) => break,
                Ok(None) => return Err(Failure::plain(format!("the blob ended after {offset} bytes")).into()),
                Err(status) => {
                    connection.pause_or_fail(status).await?;
                    break;
                }
            }
        }
    }
    let found = hasher.finalize();
    if found == digest && size == Some(offset) {
        return Ok(offset);
    }
    let message = format!("what arrived has sha256 {found}, not {digest}; nothing was written");
    Err(Failure { word: Some("digest_mismatch".to_owned()), ..Failure::plain(message) }.into())
}
