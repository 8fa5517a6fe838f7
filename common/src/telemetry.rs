//! Log lines on stderr: a filter that can change while running, as text or JSON.

use std::io::IsTerminal;

use serde::{Deserialize, Serialize};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt, reload};

/// The environment variable that overrides the configured filter.
pub const FILTER_VARIABLE: &str = "HELIX_LOG";

/// The filter when none is given. HTTP/2 says too much at INFO for a program's log.
pub const FILTER_DEFAULT: &str = "info,h2=warn,hyper=warn,rustls=warn,tower=warn";

/// The shape of a log line.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// One object a line.
    Json,
}

/// Why logging could not start or change.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter is malformed.
    #[error("{filter:?} is not a log filter such as `info` or `info,helix_coordinator=debug`: {why}")]
    Filter {
        /// The text.
        filter: String,
        /// What is wrong with it.
        why: String,
    },
    /// Logging was started before in this process.
    #[error("logging has been started already")]
    Started,
}

/// Changes the filter of a running process.
#[derive(Clone, Debug)]
pub struct Handle {
    filter: reload::Handle<EnvFilter, Registry>,
}

impl Handle {
    /// Uses another filter from now on; `HELIX_LOG` still wins.
    ///
    /// # Errors
    /// When the filter is malformed; the former one stays.
    pub fn reload(&self, filter: Option<&str>) -> Result<(), TelemetryError> {
        let parsed = choose(filter)?;
        self.filter.reload(parsed).map_err(|_| TelemetryError::Started)
    }
}

/// Starts logging for this process. `HELIX_LOG` wins over `filter`, which wins over [`FILTER_DEFAULT`].
///
/// # Errors
/// When the filter is malformed, or logging was started before.
pub fn init(filter: Option<&str>, format: Format) -> Result<Handle, TelemetryError> {
    let (layer, handle) = reload::Layer::new(choose(filter)?);
    let colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let lines = match format {
        Format::Text => fmt::layer().with_writer(std::io::stderr).with_ansi(colour).boxed(),
        Format::Json => fmt::layer().with_writer(std::io::stderr).json().flatten_event(true).boxed(),
    };
    tracing_subscriber::registry().with(layer).with(lines).try_init().map_err(|_| TelemetryError::Started)?;
    Ok(Handle { filter: handle })
}

/// Checks a filter without using it.
///
/// # Errors
/// When it is malformed.
pub fn check_filter(filter: &str) -> Result<(), TelemetryError> {
    parse(filter).map(|_| ())
}

fn choose(configured: Option<&str>) -> Result<EnvFilter, TelemetryError> {
    let variable = std::env::var(FILTER_VARIABLE).ok().filter(|text| !text.is_empty());
    parse(variable.as_deref().or(configured).unwrap_or(FILTER_DEFAULT))
}

fn parse(filter: &str) -> Result<EnvFilter, TelemetryError> {
    EnvFilter::try_new(filter)
        .map_err(|error| TelemetryError::Filter { filter: filter.to_owned(), why: error.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_checked() {
        for good in ["info", FILTER_DEFAULT, "warn,helix_common::tls=trace"] {
            assert!(check_filter(good).is_ok(), "{good}");
        }
        assert!(check_filter("helix=loud").is_err());
    }
}
