//! `helix artifacts ls|get`: what a build made; a download counts only if its sha256 is right.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use helix_model::Digest;
use helix_proto::v1;
use serde_json::Value;

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
        /// Only those of the task of this platform
        #[arg(long, value_name = "P")]
        task: Option<String>,
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
        /// Of the task of this platform; of a build for several platforms, each may have one of the same name
        #[arg(long, value_name = "P")]
        task: Option<String>,
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
        ArtifactsVerb::Ls { build, task, stale } => {
            let (_, found) = list(&connection, &build, task.as_deref(), stale).await?;
            let has_tasks = found.iter().any(|made| !made.platform.is_empty());
            let items: Vec<Item> = found.iter().map(|made| made.item(has_tasks)).collect();
            let header = ["name", "size", "sha256", "task"];
            output.items(if has_tasks { &header } else { &header[..3] }, &items);
        }
        ArtifactsVerb::Get { build, name, task, path, extract, stale } => {
            let (id, found) = list(&connection, &build, task.as_deref(), stale).await?;
            let made = choose(&id, &found, name.as_deref())?;
            let fetching = async {
                if extract {
                    fetch_directory(&connection, made, path, output).await
                } else {
                    fetch(&connection, made, path, output).await
                }
            };
            tokio::select! {
                fetched = fetching => fetched?,
                // What has come so far is removed; a mere signal would leave it.
                _ = tokio::signal::ctrl_c() => return Err(Failure::interrupted()),
            }
        }
    }
    Ok(Code::SUCCESS)
}

/// An artifact, and for which platform; that is empty where its build names none, and for what a client registered.
struct Made {
    artifact: v1::ArtifactInfo,
    platform: String,
}

impl Made {
    fn item(&self, has_tasks: bool) -> Item {
        let artifact = &self.artifact;
        let mut cells = vec![artifact.name.clone(), size_text(artifact.size), artifact.digest.clone()];
        cells.extend(has_tasks.then(|| self.platform.clone()));
        Item { name: artifact.name.clone(), cells, json: self.json() }
    }

    fn json(&self) -> Value {
        status::artifact_json(&self.artifact, &self.platform)
    }
}

async fn list(
    connection: &Connection,
    build: &str,
    task: Option<&str>,
    stale: bool,
) -> Result<(String, Vec<Made>), Failure> {
    let id = connection.resolve_as(build, stale).await?;
    let request = v1::GetArtifactsRequest { build_id: id.clone(), stale };
    let response = connection
        .call(|channel| {
            let request = request.clone();
            async move { builds(channel).get_artifacts(request).await.map(tonic::Response::into_inner) }
        })
        .await?;
    let tasks = connection.status(&id, stale).await?.tasks;
    if let Some(platform) = task {
        status::task_of(&id, &tasks, platform)?;
    }
    let made = response
        .artifacts
        .into_iter()
        .map(|artifact| Made { platform: status::platform_of_artifact(&artifact, &tasks).to_owned(), artifact });
    Ok((id, made.filter(|made| task.is_none_or(|platform| made.platform == platform)).collect()))
}

fn choose<'a>(id: &str, found: &'a [Made], name: Option<&str>) -> Result<&'a Made, Failure> {
    let names = || found.iter().map(|made| made.artifact.name.as_str()).collect::<BTreeSet<_>>();
    let listed = || names().into_iter().collect::<Vec<_>>().join(", ");
    let missing = |message: String| Failure {
        word: Some("artifact_unknown".into()),
        code: Code::NOT_FOUND,
        ..Failure::plain(message)
    };
    if name.is_none() && names().len() > 1 {
        return Err(Failure::usage(format!("build {id} has several artifacts, name one: {}", listed())));
    }
    let fits: Vec<_> = found.iter().filter(|made| name.is_none_or(|name| made.artifact.name == name)).collect();
    match (fits.as_slice(), name) {
        ([one], _) => Ok(one),
        ([], Some(name)) if !found.is_empty() => {
            Err(missing(format!("build {id} has no artifact {name}; it has {}", listed())))
        }
        ([], _) => Err(missing(format!("build {id} has no artifacts"))),
        ([first, ..], _) => {
            let platforms: BTreeSet<_> =
                fits.iter().map(|made| made.platform.as_str()).filter(|platform| !platform.is_empty()).collect();
            if platforms.len() <= 1 {
                // What the task made stands before what a client registered under its name.
                return Ok(first);
            }
            let platforms = platforms.into_iter().collect::<Vec<_>>();
            Err(Failure::usage(format!(
                "build {id} has several artifacts {}, say which with --task: {}",
                first.artifact.name,
                platforms.join(", ")
            )))
        }
    }
}

async fn fetch(connection: &Connection, made: &Made, path: Option<PathBuf>, output: &Output) -> Result<(), Failure> {
    let artifact = &made.artifact;
    let named = path.is_some();
    let mut path = path.map_or_else(|| own_name(artifact), Ok)?;
    let digest = Digest::parse(&artifact.digest)?;
    let in_directory = match Target::of(&path) {
        Ok(Target::File(path)) => directory_of(&path),
        Ok(Target::Stream(_)) => std::env::temp_dir(),
        // A directory's tar gets a name of its own beside it.
        Err(error) if !named && error.kind() == std::io::ErrorKind::IsADirectory => directory_of(&path),
        Err(error) => return Err(cannot_write(&path, &error)),
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
            &Item { name: path.display().to_string(), cells: Vec::new(), json: made.json() },
            &format!("{} sha256:{digest}", path.display()),
        );
    }
    Ok(())
}

/// Fetches a directory's tar and unpacks it: whole, or nothing is left.
async fn fetch_directory(
    connection: &Connection,
    made: &Made,
    path: Option<PathBuf>,
    output: &Output,
) -> Result<(), Failure> {
    let artifact = &made.artifact;
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
    output.item(&Item { name: shown, cells: Vec::new(), json: made.json() }, &text);
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
