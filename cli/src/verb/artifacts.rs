//! `helix artifacts ls|get`: what a build made; a download counts only if its sha256 is right.

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use helix_model::Digest;
use helix_proto::v1;

use crate::connection::{Connection, builds};
use crate::context::ContextOptions;
use crate::download::{self, NotFetched};
use crate::exit::Code;
use crate::failure::Failure;
use crate::output::{Item, Output, size_text};
use crate::unpack;
use crate::upload::progress_bar;
use crate::verb::status;

/// `helix artifacts`.
#[derive(Args)]
pub(crate) struct ArtifactsArguments {
    #[command(subcommand)]
    verb: ArtifactsVerb,
}

#[derive(Subcommand)]
enum ArtifactsVerb {
    /// List a build's artifacts
    #[command(alias = "list")]
    Ls {
        /// A build id, a unique prefix of it, or `last`
        #[arg(value_name = "ID")]
        build: String,
        /// Answer from what the coordinator at hand knows, without asking the leader
        #[arg(long)]
        stale: bool,
    },
    /// Fetch an artifact; a directory comes as a tar
    Get {
        /// A build id, a unique prefix of it, or `last`
        #[arg(value_name = "ID")]
        build: String,
        /// Which one; may be left out when there is only one
        name: Option<String>,
        /// Where to write it [default: its name in this directory; - for standard output]
        #[arg(short = 'O', long = "output", value_name = "PATH")]
        path: Option<PathBuf>,
        /// Unpack a directory's tar into PATH, which must not exist yet, instead of writing the tar
        #[arg(long)]
        extract: bool,
        /// Answer from what the coordinator at hand knows, without asking the leader
        #[arg(long)]
        stale: bool,
    },
}

pub(crate) async fn run(
    arguments: ArtifactsArguments,
    context: &ContextOptions,
    output: &Output,
) -> Result<Code, Failure> {
    let connection = Connection::open(context)?;
    match arguments.verb {
        ArtifactsVerb::Ls { build, stale } => {
            let found = list(&connection, &build, stale).await?.1;
            let items: Vec<Item> = found
                .iter()
                .map(|artifact| Item {
                    name: artifact.name.clone(),
                    cells: vec![artifact.name.clone(), size_text(artifact.size), artifact.digest.clone()],
                    json: status::artifact_json(artifact),
                })
                .collect();
            output.items(&["name", "size", "sha256"], &items);
        }
        ArtifactsVerb::Get { build, name, path, extract, stale } => {
            let (id, found) = list(&connection, &build, stale).await?;
            let artifact = choose(&id, &found, name.as_deref())?;
            if extract {
                fetch_directory(&connection, artifact, path, output).await?;
            } else {
                fetch(&connection, artifact, path, output).await?;
            }
        }
    }
    Ok(Code::SUCCESS)
}

async fn list(connection: &Connection, build: &str, stale: bool) -> Result<(String, Vec<v1::ArtifactInfo>), Failure> {
    let id = connection.resolve_as(build, stale).await?;
    let request = v1::GetArtifactsRequest { build_id: id.clone(), stale };
    let response = connection
        .call(|channel| {
            let request = request.clone();
            async move { builds(channel).get_artifacts(request).await.map(tonic::Response::into_inner) }
        })
        .await?;
    Ok((id, response.artifacts))
}

fn choose<'a>(id: &str, found: &'a [v1::ArtifactInfo], name: Option<&str>) -> Result<&'a v1::ArtifactInfo, Failure> {
    let names = || found.iter().map(|artifact| artifact.name.as_str()).collect::<Vec<_>>().join(", ");
    let missing = |message: String| Failure {
        word: Some("artifact_unknown".into()),
        code: Code::NOT_FOUND,
        ..Failure::plain(message)
    };
    match (name, found) {
        (_, []) => Err(missing(format!("build {id} has no artifacts"))),
        (None, [one]) => Ok(one),
        (None, _) => Err(Failure::usage(format!("build {id} has several artifacts, name one: {}", names()))),
        (Some(name), _) => found
            .iter()
            .find(|artifact| artifact.name == name)
            .ok_or_else(|| missing(format!("build {id} has no artifact {name}; it has {}", names()))),
    }
}

async fn fetch(
    connection: &Connection,
    artifact: &v1::ArtifactInfo,
    path: Option<PathBuf>,
    output: &Output,
) -> Result<(), Failure> {
    let named = path.is_some();
    let mut path = path.map_or_else(|| own_name(artifact), Ok)?;
    let digest = Digest::parse(&artifact.digest)?;
    let in_directory = match Target::of(&path).map_err(|error| cannot_write(&path, &error))? {
        Target::File(path) => directory_of(&path),
        Target::Stream(_) => std::env::temp_dir(),
    };
    let mut file = tempfile::NamedTempFile::new_in(in_directory).map_err(|error| cannot_write(&path, &error))?;
    download(connection, digest, artifact.size, &mut file).await?;
    if !named && path.extension().is_none_or(|extension| extension != "tar") && unpack::is_tar(file.as_file()) {
        path.as_mut_os_string().push(".tar");
    }
    let cannot = |error: std::io::Error| cannot_write(&path, &error);
    match Target::of(&path).map_err(cannot)? {
        // Nobody may have seen a byte before the digest was right.
        Target::Stream(mut stream) => {
            let mut reader = std::fs::File::open(file.path()).map_err(cannot)?;
            match std::io::copy(&mut reader, &mut stream).and_then(|_| stream.flush()) {
                // A reader who has enough ends it, as with a log.
                Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => return Ok(()),
                other => other.map_err(cannot)?,
            }
        }
        Target::File(path) => {
            file.as_file().set_permissions(permissions(&path)).map_err(cannot)?;
            file.as_file().sync_all().map_err(cannot)?;
            file.persist(&path).map_err(|error| cannot(error.error))?;
        }
    }
    if path != Path::new("-") {
        output.item(
            &Item { name: path.display().to_string(), cells: Vec::new(), json: status::artifact_json(artifact) },
            &format!("{} sha256:{digest}", path.display()),
        );
    }
    Ok(())
}

/// Fetches a directory's tar and unpacks it: whole, or nothing is left.
async fn fetch_directory(
    connection: &Connection,
    artifact: &v1::ArtifactInfo,
    path: Option<PathBuf>,
    output: &Output,
) -> Result<(), Failure> {
    let path = path.map_or_else(|| own_name(artifact), Ok)?;
    let digest = Digest::parse(&artifact.digest)?;
    let cannot = |error: std::io::Error| cannot_write(&path, &error);
    if std::fs::symlink_metadata(&path).is_ok() {
        return Err(cannot(std::io::ErrorKind::AlreadyExists.into()));
    }
    let mut file = tempfile::tempfile().map_err(cannot)?;
    download(connection, digest, artifact.size, &mut file).await?;
    let into = tempfile::Builder::new().prefix(".helix-unpacking-").tempdir_in(directory_of(&path)).map_err(cannot)?;
    unpack::unpack(file, into.path()).map_err(cannot)?;
    std::fs::set_permissions(into.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777 & !umask()))
        .map_err(cannot)?;
    // Takes the place of nothing but, at most, an empty directory.
    std::fs::rename(into.path(), &path).map_err(cannot)?;
    let _ = into.keep();
    let shown = path.display().to_string();
    let text = format!("{shown} sha256:{digest}");
    output.item(&Item { name: shown, cells: Vec::new(), json: status::artifact_json(artifact) }, &text);
    Ok(())
}

fn own_name(artifact: &v1::ArtifactInfo) -> Result<PathBuf, Failure> {
    Path::new(&artifact.name).file_name().map(PathBuf::from).ok_or_else(|| Failure::plain("name a path with -O"))
}

fn directory_of(path: &Path) -> PathBuf {
    path.parent().filter(|parent| *parent != Path::new("")).unwrap_or(Path::new(".")).to_owned()
}

fn cannot_write(path: &Path, error: &std::io::Error) -> Failure {
    Failure::plain(format!("cannot write {}: {error}", path.display()))
}

/// Where an artifact goes: a file that is replaced whole, or something that only takes a stream.
enum Target {
    File(PathBuf),
    Stream(Box<dyn Write>),
}

impl Target {
    /// What a path means: what it leads to is kept, if that is a device or a pipe.
    fn of(path: &Path) -> std::io::Result<Self> {
        if path == Path::new("-") {
            return Ok(Self::Stream(Box::new(std::io::stdout())));
        }
        match std::fs::metadata(path) {
            Ok(there) if there.is_file() => path.canonicalize().map(Self::File),
            Ok(there) if there.is_dir() => Err(std::io::ErrorKind::IsADirectory.into()),
            Ok(_) => Ok(Self::Stream(Box::new(std::fs::OpenOptions::new().write(true).open(path)?))),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::File(path.to_owned())),
            Err(error) => Err(error),
        }
    }
}

/// The mode of the file that is replaced; of a new one, what the user's mask leaves of it.
fn permissions(path: &Path) -> std::fs::Permissions {
    let mode = std::fs::metadata(path)
        .map_or_else(|_| 0o666 & !umask(), |there| std::os::unix::fs::MetadataExt::mode(&there) & 0o777);
    std::os::unix::fs::PermissionsExt::from_mode(mode)
}

/// What a new file's mode lacks.
pub(crate) fn umask() -> u32 {
    let mask = rustix::process::umask(rustix::fs::Mode::empty());
    rustix::process::umask(mask);
    mask.bits()
}

/// Fetches an artifact's bytes, and shows how far that is.
async fn download(connection: &Connection, digest: Digest, size: u64, file: &mut impl Write) -> Result<(), Failure> {
    let bar = progress_bar("fetching", size);
    let fetched = download::blob(connection, digest, Some(size), file, |offset| bar.set_position(offset)).await;
    bar.finish_and_clear();
    match fetched {
        Ok(_) => Ok(()),
        Err(NotFetched::Here(error)) => Err(Failure::plain(format!("cannot write: {error}"))),
        Err(NotFetched::There(failure)) => Err(failure),
    }
}
