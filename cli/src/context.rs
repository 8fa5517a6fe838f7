//! Which cluster, and as whom: the context file.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use clap::builder::{OsStringValueParser, TypedValueParser};
use helix_model::parse;
use serde::{Deserialize, Serialize};

use crate::failure::Failure;

/// Options that say which cluster is meant.
#[derive(Args, Clone)]
pub(crate) struct ContextOptions {
    /// Context file: cluster, endpoints and certificates [default: ~/.config/helix/context.toml]
    #[arg(long, env = "HELIX_CONTEXT", global = true, value_name = "FILE", value_parser = maybe_empty())]
    pub(crate) context: Option<PathBuf>,

    /// How long to look for a coordinator that answers
    #[arg(
        long,
        env = "HELIX_CONNECT_TIMEOUT",
        default_value = "30s",
        global = true,
        value_name = "DUR",
        value_parser = duration
    )]
    pub(crate) connect_timeout: Duration,
}

/// A path; an empty one, as an empty variable gives it, is no mistake.
fn maybe_empty() -> impl TypedValueParser<Value = PathBuf> {
    OsStringValueParser::new().map(PathBuf::from)
}

/// A duration as a flag takes it.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    parse::duration_ms("duration", text).map(Duration::from_millis).map_err(|e| e.why)
}

/// A size as a flag takes it.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    parse::size_bytes("size", text).map_err(|e| e.why)
}

/// The context file's contents, its paths made absolute.
#[derive(Deserialize, Serialize, Debug, Clone, PartialEq)]
#[serde(deny_unknown_fields)]
pub(crate) struct Context {
    pub(crate) cluster: String,
    pub(crate) endpoints: Vec<String>,
    pub(crate) ca: PathBuf,
    pub(crate) cert: PathBuf,
    pub(crate) key: PathBuf,
}

impl ContextOptions {
    /// Finds and reads the context file.
    pub(crate) fn load(&self) -> Result<Context, Failure> {
        // An empty variable counts as none.
        let path = match self.context.as_ref().filter(|path| !path.as_os_str().is_empty()) {
            Some(path) => path.clone(),
            None => default_path()?,
        };
        Context::read(&path)
    }
}

impl Context {
    pub(crate) fn read(path: &Path) -> Result<Self, Failure> {
        let shown = path.display();
        let text = std::fs::read_to_string(path).map_err(|error| {
            Failure::plain(format!(
                "cannot read the context {shown}: {error}; name one with --context or HELIX_CONTEXT"
            ))
        })?;
        let mut context: Self =
            toml::from_str(&text).map_err(|error| Failure::plain(format!("context {shown}: {}", error.message())))?;
        if context.endpoints.is_empty() {
            return Err(Failure::plain(format!(
                "context {shown}: endpoints is empty; list https://HOST:PORT of coordinators"
            )));
        }
        let base = path.parent().unwrap_or(Path::new("."));
        for file in [&mut context.ca, &mut context.cert, &mut context.key] {
            *file = base.join(&*file);
        }
        Ok(context)
    }
}

fn default_path() -> Result<PathBuf, Failure> {
    let config = std::env::var_os("XDG_CONFIG_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let base = config.or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".config")));
    base.map(|base| base.join("helix/context.toml"))
        .ok_or_else(|| Failure::plain("no context: name one with --context or HELIX_CONTEXT"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_relative_to_the_file_and_unknown_keys_are_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("context.toml");
        let text =
            "cluster = \"c\"\nendpoints = [\"https://h:1\"]\nca = \"ca.pem\"\ncert = \"/x/c.pem\"\nkey = \"k.pem\"\n";
        std::fs::write(&path, text).unwrap();
        let context = Context::read(&path).unwrap();
        assert_eq!(context.ca, directory.path().join("ca.pem"));
        assert_eq!(context.cert, Path::new("/x/c.pem"));
        std::fs::write(&path, format!("{text}colour = 1\n")).unwrap();
        assert!(Context::read(&path).unwrap_err().message.contains("colour"));
        std::fs::write(&path, text.replace("\"https://h:1\"", "")).unwrap();
        assert!(Context::read(&path).unwrap_err().message.contains("endpoints"));
    }
}
