//! Sending a directory as a build's source: a deterministic zstd-compressed tar, stored as a blob.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use helix_common::sha256::Sha256;
use helix_common::status::is_worth_beginning_anew;
use helix_model::limits::CHUNK_BYTES;
use helix_model::{Digest, Source};
use helix_proto::v1::{self, put_blob_request::Part};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::connection::{Connection, blobs};
use crate::failure::Failure;
use crate::output::Output;

/// Packs and uploads a directory; what the cluster holds already is not sent again.
pub(crate) async fn directory(connection: &Connection, path: &Path, output: &Output) -> Result<Source, Failure> {
    let root = path.to_owned();
    let shown = path.display().to_string();
    let packed = tokio::task::spawn_blocking(move || pack(&root)).await;
    let packed = packed.map_err(|error| Failure::plain(format!("packing {shown}: {error}")))?;
    let (mut file, source, skipped) =
        packed.map_err(|error| Failure::plain(format!("cannot pack {shown}: {error}")))?;
    for path in skipped {
        output.say(&format!("left out {}: neither file, directory nor link", path.display()));
    }
    if !present(connection, source.digest).await? {
        send(connection, &mut file, source).await?;
    }
    Ok(source)
}

/// A bar on stderr, invisible unless that is a terminal.
pub(crate) fn progress_bar(what: &'static str, size: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(size), ProgressDrawTarget::stderr());
    if let Ok(style) = ProgressStyle::with_template("{msg} {bytes}/{total_bytes} {bytes_per_sec} {wide_bar}") {
        bar.set_style(style);
    }
    bar.with_message(what)
}

async fn present(connection: &Connection, digest: Digest) -> Result<bool, Failure> {
    let request = v1::HeadBlobsRequest { sha256: vec![digest.0.to_vec().into()], local: false };
    let call = |channel| {
        let request = request.clone();
        async move { blobs(channel).head_blobs(request).await }
    };
    Ok(connection.call(call).await?.into_inner().blobs.first().is_some_and(|blob| blob.present))
}

/// Uploads, resuming where a broken attempt left off.
async fn send(connection: &Connection, file: &mut File, source: Source) -> Result<(), Failure> {
    let bar = progress_bar("uploading", source.size);
    loop {
        let request = v1::UploadOffsetRequest { sha256: source.digest.0.to_vec().into() };
        let call = |channel| {
            let request = request.clone();
            async move { blobs(channel).upload_offset(request).await }
        };
        let offset = connection.call(call).await?.into_inner().offset.min(source.size);
        let reader =
            file.try_clone().map_err(|error| Failure::plain(format!("cannot read the packed source: {error}")))?;
        let (parts_tx, parts) = mpsc::channel(4);
        let feeder_bar = bar.clone();
        let feeder = tokio::task::spawn_blocking(move || feed(reader, source, offset, &parts_tx, &feeder_bar));
        let call = |channel| async move { blobs(channel).put_blob(ReceiverStream::new(parts)).await };
        let result = connection.once(call).await;
        let fed = feeder.await.map_err(|error| Failure::plain(format!("reading the packed source: {error}")))?;
        match result {
            Ok(_) => {
                bar.finish_and_clear();
                return fed.map_err(|error| Failure::plain(format!("cannot read the packed source: {error}")));
            }
            // What an earlier upload had sent was not these bytes. It is gone, so that this comes once for each coordinator.
            Err(status) if is_worth_beginning_anew(&status) => {}
            Err(status) => connection.pause_or_fail(status).await?,
        }
    }
}

fn feed(
    mut file: File,
    source: Source,
    offset: u64,
    parts: &mpsc::Sender<v1::PutBlobRequest>,
    bar: &ProgressBar,
) -> io::Result<()> {
    let sha256 = source.digest.0.to_vec().into();
    let header = v1::PutBlobHeader { sha256, size: source.size, offset, copies: 0 };
    if parts.blocking_send(v1::PutBlobRequest { part: Some(Part::Header(header)) }).is_err() {
        return Ok(());
    }
    file.seek(SeekFrom::Start(offset))?;
    let mut position = offset;
    while position < source.size {
        let mut chunk = vec![0; CHUNK_BYTES];
        let read = file.read(&mut chunk)?;
        chunk.truncate(read);
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if parts.blocking_send(v1::PutBlobRequest { part: Some(Part::Data(chunk.into())) }).is_err() {
            return Ok(());
        }
        position += read as u64;
        bar.set_position(position);
    }
    Ok(())
}

/// Hashes what passes through to the file.
struct Hashing {
    file: File,
    hasher: Sha256,
    size: u64,
}

impl Write for Hashing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        self.size += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Packs a directory into a temporary file: sorted names, no owners, no times, so that equal trees are equal blobs.
fn pack(root: &Path) -> io::Result<(File, Source, Vec<PathBuf>)> {
    if !fs::metadata(root)?.is_dir() {
        return Err(io::Error::new(io::ErrorKind::NotADirectory, "not a directory"));
    }
    let sink = Hashing { file: tempfile::tempfile()?, hasher: Sha256::new(), size: 0 };
    let mut tar = tar::Builder::new(zstd::Encoder::new(sink, 3)?);
    let mut skipped = Vec::new();
    append_children(&mut tar, root, Path::new(""), &mut skipped)?;
    let sink = tar.into_inner()?.finish()?;
    let digest = sink.hasher.finalize();
    Ok((sink.file, Source { digest, size: sink.size }, skipped))
}

fn append_children<W: Write>(
    tar: &mut tar::Builder<W>,
    root: &Path,
    below: &Path,
    skipped: &mut Vec<PathBuf>,
) -> io::Result<()> {
    let mut names: Vec<_> =
        fs::read_dir(root.join(below))?.map(|entry| entry.map(|entry| entry.file_name())).collect::<Result<_, _>>()?;
    names.sort();
    for name in names {
        let relative = below.join(&name);
        let full = root.join(&relative);
        let metadata = fs::symlink_metadata(&full)?;
        let mut header = tar::Header::new_gnu();
        header.set_mtime(0);
        header.set_mode(if metadata.mode() & 0o111 == 0 { 0o644 } else { 0o755 });
        header.set_size(0);
        if metadata.is_dir() {
            header.set_entry_type(tar::EntryType::Directory);
            tar.append_data(&mut header, &relative, io::empty())?;
            append_children(tar, root, &relative, skipped)?;
        } else if metadata.is_symlink() {
            header.set_entry_type(tar::EntryType::Symlink);
            tar.append_link(&mut header, &relative, fs::read_link(&full)?)?;
        } else if metadata.is_file() {
            header.set_entry_type(tar::EntryType::Regular);
            let file = File::open(&full)?;
            let size = file.metadata()?.len();
            header.set_size(size);
            let mut whole = file.take(size);
            tar.append_data(&mut header, &relative, &mut whole)?;
            if whole.limit() > 0 {
                // What follows in the archive would be taken for the rest of it.
                let text = format!("{} became shorter while it was read", full.display());
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, text));
            }
        } else {
            skipped.push(relative);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    use helix_common::accept::{self, Limits};
    use helix_common::identity::Role;
    use helix_common::pki::{Authority, VALID_FOR_DEFAULT};
    use helix_common::status::{RESUMED, with_metadata};
    use helix_common::tls::{TlsFiles, TlsStore};
    use helix_model::ErrorCode;
    use helix_proto::v1::blob_service_server::{BlobService, BlobServiceServer};
    use tonic::{Request, Response, Status, Streaming};

    use super::*;
    use crate::context::ContextOptions;

    /// A coordinator with the part of an upload, which is not what it was.
    #[derive(Clone, Default)]
    struct Rotten {
        /// Where uploads began.
        offsets: Arc<Mutex<Vec<u64>>>,
    }

    #[tonic::async_trait]
    impl BlobService for Rotten {
        type GetBlobStream = tokio_stream::Empty<Result<v1::GetBlobResponse, Status>>;

        async fn upload_offset(
            &self,
            _: Request<v1::UploadOffsetRequest>,
        ) -> Result<Response<v1::UploadOffsetResponse>, Status> {
            let offset = if self.offsets.lock().unwrap().is_empty() { 100 } else { 0 };
            Ok(Response::new(v1::UploadOffsetResponse { offset }))
        }

        async fn put_blob(
            &self,
            request: Request<Streaming<v1::PutBlobRequest>>,
        ) -> Result<Response<v1::PutBlobResponse>, Status> {
            let mut parts = request.into_inner();
            let mut offset = 0;
            while let Some(part) = parts.message().await? {
                if let Some(Part::Header(header)) = part.part {
                    offset = header.offset;
                }
            }
            self.offsets.lock().unwrap().push(offset);
            if offset > 0 {
                return Err(with_metadata(ErrorCode::DigestMismatch, "other bytes", [(RESUMED, "true")]));
            }
            Ok(Response::new(v1::PutBlobResponse { holders: vec![1] }))
        }

        async fn head_blobs(
            &self,
            _: Request<v1::HeadBlobsRequest>,
        ) -> Result<Response<v1::HeadBlobsResponse>, Status> {
            Err(Status::unimplemented("not asked here"))
        }

        async fn put_small_blobs(
            &self,
            _: Request<v1::PutSmallBlobsRequest>,
        ) -> Result<Response<v1::PutSmallBlobsResponse>, Status> {
            Err(Status::unimplemented("not asked here"))
        }

        async fn get_blob(&self, _: Request<v1::GetBlobRequest>) -> Result<Response<Self::GetBlobStream>, Status> {
            Err(Status::unimplemented("not asked here"))
        }
    }

    #[tokio::test]
    async fn an_upload_whose_earlier_part_was_bad_begins_anew() {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::create("test").unwrap();
        authority.save(dir.path()).unwrap();
        let issue = |role, name, stem| {
            let issued = authority.issue(role, name, &["127.0.0.1".to_owned()], VALID_FOR_DEFAULT).unwrap();
            let (cert, key) = issued.save(dir.path(), stem).unwrap();
            TlsFiles { ca: dir.path().join("ca.pem"), cert, key, revoked: None }
        };
        let own = TlsStore::load(issue(Role::Coordinator, "1", "coordinator")).unwrap();
        issue(Role::Client, "c", "client");
        let listener = accept::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let endpoint = format!("https://{}", listener.local_addr().unwrap());
        let rotten = Rotten::default();
        let router = accept::server().add_service(BlobServiceServer::new(rotten.clone()));
        tokio::spawn(router.serve_with_incoming(accept::serve(listener, own, Limits::default())));
        let context = dir.path().join("context.toml");
        let files = "ca = \"ca.pem\"\ncert = \"client.pem\"\nkey = \"client-key.pem\"";
        fs::write(&context, format!("cluster = \"test\"\nendpoints = [{endpoint:?}]\n{files}\n")).unwrap();
        let options = ContextOptions { context: Some(context), connect_timeout: Duration::from_secs(60) };
        let connection = Connection::open(&options).unwrap();
        fs::write(dir.path().join("source"), [7; 300]).unwrap();
        let source = Source { digest: Sha256::digest(&[7; 300]), size: 300 };
        let mut file = File::open(dir.path().join("source")).unwrap();
        send(&connection, &mut file, source).await.unwrap();
        assert_eq!(*rotten.offsets.lock().unwrap(), [100, 0]);
    }

    #[test]
    fn equal_trees_are_equal_blobs_and_modes_count() {
        let make = || {
            let root = tempfile::tempdir().unwrap();
            fs::create_dir(root.path().join("b")).unwrap();
            fs::write(root.path().join("b/x"), "1").unwrap();
            fs::write(root.path().join("a"), "2").unwrap();
            std::os::unix::fs::symlink("a", root.path().join("link")).unwrap();
            root
        };
        let (one, two) = (make(), make());
        let digest = |root: &tempfile::TempDir| pack(root.path()).unwrap().1.digest;
        assert_eq!(digest(&one), digest(&two));
        let mut permissions = fs::metadata(two.path().join("a")).unwrap().permissions();
        std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o755);
        fs::set_permissions(two.path().join("a"), permissions).unwrap();
        assert_ne!(digest(&one), digest(&two));
    }

    #[test]
    fn the_archive_unpacks_to_the_same_tree() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("new\nline"), "x".repeat(100_000)).unwrap();
        let (mut file, source, _) = pack(root.path()).unwrap();
        assert_eq!(file.metadata().unwrap().len(), source.size);
        file.seek(SeekFrom::Start(0)).unwrap();
        let target = tempfile::tempdir().unwrap();
        tar::Archive::new(zstd::Decoder::new(file).unwrap()).unpack(target.path()).unwrap();
        assert_eq!(fs::read_to_string(target.path().join("new\nline")).unwrap().len(), 100_000);
    }
}
