//! `helix cluster snapshot save|restore`: backups of a cluster that serves meanwhile.
//!
//! `save` writes a file that is whole or absent, and blobs beside it, each whole or absent. `restore` is the coordinator's
//! own: it alone knows its data directory's form; this finds the program and hands over.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Subcommand;
use futures::StreamExt;
use helix_common::backup::{BackupWriter, blob_path};
use helix_common::files::sync_directory;
use helix_model::{Digest, ErrorCode};
use helix_proto::v1;
use helix_proto::v1::save_snapshot_response::Part;
use prost::Message;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tonic::{Status, Streaming};

use crate::connection::{Connection, cluster};
use crate::context::ContextOptions;
use crate::dev::layout::program;
use crate::download::{self, NotFetched};
use crate::exit::Code;
use crate::failure::Failure;
use crate::output::{Item, Output, size_text, time_text};

/// Blobs that are fetched at a time.
const FETCHES: usize = 8;
/// Blobs that are named when they cannot be had.
const EXAMPLES: usize = 5;

#[derive(Subcommand)]
pub(crate) enum SnapshotVerb {
    /// Write a backup of the registry: it has every build that was acknowledged before the command began
    Save {
        /// Where to; a file that is there is replaced when the new one is whole
        file: PathBuf,
        /// Also fetch what builds made and said into this directory, unless it has it already
        #[arg(long, value_name = "DIR")]
        blobs: Option<PathBuf>,
    },
    /// Make a node of a new cluster from a backup, on its host (runs `helix-coordinator restore`, which lies beside this command
    /// or on PATH)
    Restore {
        /// What `save` wrote
        file: PathBuf,
        /// The new cluster's name: the old one's, unless --rename is given
        #[arg(long, value_name = "NAME")]
        cluster: String,
        /// The node's id, never used in the old cluster
        #[arg(long, value_name = "N")]
        id: u64,
        /// All members of the new cluster; give each the same file and the same members
        #[arg(long, value_name = "ID=HOST:PORT,...")]
        members: String,
        /// Its data directory, empty or absent
        #[arg(long, value_name = "DIR")]
        data_dir: PathBuf,
        /// What `save --blobs` wrote
        #[arg(long, value_name = "DIR")]
        blobs: Option<PathBuf>,
        /// The new cluster has another name than the old one
        #[arg(long)]
        rename: bool,
    },
}

pub(crate) async fn run(verb: SnapshotVerb, context: &ContextOptions, output: &Output) -> Result<Code, Failure> {
    match verb {
        SnapshotVerb::Save { file, blobs } => save(&file, blobs.as_deref(), context, output).await,
        SnapshotVerb::Restore { file, cluster, id, members, data_dir, blobs, rename } => {
            let path = program("helix-coordinator")?;
            let mut command = Command::new(&path);
            command.arg("restore").arg("--snapshot").arg(file).args(["--cluster", &cluster, "--members", &members]);
            command.args(["--id", &id.to_string()]).arg("--data-dir").arg(data_dir);
            if let Some(blobs) = blobs {
                command.arg("--blobs").arg(blobs);
            }
            if rename {
                command.arg("--rename");
            }
            // Returns only when it cannot: from then on this process is that program.
            Err(cannot("run", &path, &command.exec()))
        }
    }
}

fn cannot(what: &str, path: &Path, error: &std::io::Error) -> Failure {
    Failure::plain(format!("cannot {what} {}: {error}", path.display()))
}

/// What ended a try.
enum Trouble {
    /// The stream: another may go better.
    Stream(Status),
    /// Something here.
    Here(Failure),
}

impl From<Status> for Trouble {
    fn from(status: Status) -> Self {
        Self::Stream(status)
    }
}

async fn save(
    file: &Path,
    directory: Option<&Path>,
    context: &ContextOptions,
    output: &Output,
) -> Result<Code, Failure> {
    let connection = Connection::open(context)?;
    if let Some(directory) = directory {
        std::fs::create_dir_all(directory).map_err(|error| cannot("make", directory, &error))?;
    }
    let (header, named) = loop {
        let request = v1::SaveSnapshotRequest { list_blobs: directory.is_some() };
        let begun = connection.once(|channel| async move { cluster(channel).save_snapshot(request).await }).await;
        let tried = match begun {
            Ok(stream) => receive(stream.into_inner(), file).await,
            Err(status) => Err(Trouble::Stream(status)),
        };
        match tried {
            Ok(saved) => break saved,
            Err(Trouble::Here(failure)) => return Err(failure),
            // From the beginning, and until the patience ends: what a broken stream left is of no use.
            Err(Trouble::Stream(status)) => connection.pause_or_fail(status).await?,
        }
    };
    let fetched = match directory {
        Some(directory) => fetch_all(&connection, &named, directory, output).await?,
        None => Fetched::default(),
    };
    let taken = time_text(header.taken_at_ms);
    let shown = file.display().to_string();
    let json = json!({
        "file": shown, "cluster": header.cluster, "term": header.term, "index": header.index, "taken_at": taken,
        "bytes": header.bytes, "blobs": named.len(), "fetched": fetched.count, "missing": fetched.missing,
    });
    let mut text = format!(
        "{shown}: cluster {} as of entry {} ({taken}), {}",
        header.cluster,
        header.index,
        size_text(header.bytes)
    );
    if directory.is_some() {
        text.push_str(&format!(
            "\n{} blobs, {} of them fetched now ({})",
            named.len(),
            fetched.count,
            size_text(fetched.bytes)
        ));
    }
    output.item(&Item { name: shown, cells: Vec::new(), json }, &text);
    if fetched.missing.is_empty() {
        return Ok(Code::SUCCESS);
    }
    let examples: Vec<&str> = fetched.missing.iter().take(EXAMPLES).map(String::as_str).collect();
    let message = format!(
        "{} blobs could not be fetched, such as {}: bring back the coordinators that hold them and repeat the command, which \
         goes on. The file itself is whole",
        fetched.missing.len(),
        examples.join(", ")
    );
    Err(Failure { word: Some(ErrorCode::BackupIncomplete.as_str().to_owned()), ..Failure::plain(message) })
}

async fn receive(
    mut stream: Streaming<v1::SaveSnapshotResponse>,
    path: &Path,
) -> Result<(v1::BackupHeader, Vec<Digest>), Trouble> {
    let here = |error: std::io::Error| Trouble::Here(cannot("write", path, &error));
    let damaged = |what: &str| Trouble::Stream(Status::unavailable(format!("the backup came damaged: {what}")));
    let Some(Part::Header(header)) = next(&mut stream).await? else { return Err(damaged("no header")) };
    let mut file = BackupWriter::create(path, &header.encode_to_vec(), header.bytes).map_err(here)?;
    let (mut hash, mut offset) = (Sha256::new(), 0u64);
    loop {
        match next(&mut stream).await? {
            Some(Part::Chunk(chunk)) => {
                if chunk.offset != offset || crc32fast::hash(&chunk.data) != chunk.crc32 {
                    return Err(damaged("a chunk is damaged or out of place"));
                }
                offset += chunk.data.len() as u64;
                if offset > header.bytes {
                    return Err(damaged("more bytes than announced"));
                }
                hash.update(&chunk.data);
                file.write(&chunk.data).map_err(here)?;
            }
            Some(Part::Trailer(trailer)) => {
                if offset != header.bytes || trailer.sha256[..] != hash.finalize()[..] {
                    return Err(damaged("its checksum is wrong"));
                }
                break;
            }
            _ => return Err(damaged("no trailer")),
        }
    }
    let mut named = Vec::new();
    loop {
        match next(&mut stream).await? {
            Some(Part::Blobs(page)) => {
                for digest in page.sha256 {
                    named.push(Digest::from_slice(&digest).map_err(|_| damaged("a digest is none"))?);
                }
            }
            Some(Part::End(v1::BackupEnd {})) => break,
            _ => return Err(damaged("no end")),
        }
    }
    named.sort_unstable();
    named.dedup();
    file.finish().map_err(here)?;
    Ok((header, named))
}

async fn next(stream: &mut Streaming<v1::SaveSnapshotResponse>) -> Result<Option<Part>, Status> {
    let message = stream.message().await?;
    message.map(|message| message.part).ok_or_else(|| Status::unavailable("the coordinator ended the backup early"))
}

#[derive(Default)]
struct Fetched {
    count: usize,
    bytes: u64,
    missing: Vec<String>,
}

async fn fetch_all(
    connection: &Connection,
    named: &[Digest],
    directory: &Path,
    output: &Output,
) -> Result<Fetched, Failure> {
    let mut fetched = Fetched::default();
    // A name is given to whole files alone.
    let wanted: Vec<Digest> = named.iter().filter(|digest| !blob_path(directory, digest).exists()).copied().collect();
    let fetches = wanted.into_iter().map(|digest| async move { (digest, fetch(connection, digest, directory).await) });
    let mut fetches = futures::stream::iter(fetches).buffer_unordered(FETCHES);
    while let Some((digest, outcome)) = fetches.next().await {
        match outcome {
            Ok(size) => {
                fetched.count += 1;
                fetched.bytes += size;
            }
            // A full disk is no missing blob: what is there stays, and the same command goes on.
            Err(NotFetched::Here(error)) => return Err(cannot("write blobs into", directory, &error)),
            Err(NotFetched::There(failure)) if failure.code == Code::UNREACHABLE => return Err(failure),
            Err(NotFetched::There(failure)) => {
                output.say(&format!("blob {digest}: {}", failure.message));
                fetched.missing.push(digest.to_string());
            }
        }
    }
    let shelves = std::fs::read_dir(directory).map_err(|error| cannot("read", directory, &error))?;
    let shelves = shelves.flatten().map(|entry| entry.path()).filter(|path| path.is_dir());
    for path in shelves.chain([directory.to_owned()]) {
        sync_directory(&path).map_err(|error| cannot("sync", &path, &error))?;
    }
    Ok(fetched)
}

/// Fetches a blob whole, or leaves nothing.
async fn fetch(connection: &Connection, digest: Digest, directory: &Path) -> Result<u64, NotFetched> {
    let path = blob_path(directory, &digest);
    let shelf = path.parent().unwrap_or(directory);
    std::fs::create_dir_all(shelf).map_err(NotFetched::Here)?;
    let mut file = tempfile::NamedTempFile::new_in(shelf).map_err(NotFetched::Here)?;
    let size = download::blob(connection, digest, None, &mut file, |_| {}).await?;
    file.as_file().sync_all().map_err(NotFetched::Here)?;
    file.persist(&path).map_err(|error| NotFetched::Here(error.error))?;
    Ok(size)
}
