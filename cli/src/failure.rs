//! What a verb can fail with: a message for people, a stable word, an exit code.

use helix_common::status::{error_code, metadata};
use helix_model::{ErrorCode, InvalidField};
use tonic::{Code, Status};

use crate::exit;

/// A verb did not do what was asked.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    /// The stable word, if there is one.
    pub(crate) word: Option<String>,
    pub(crate) message: String,
    pub(crate) code: exit::Code,
}

impl Failure {
    pub(crate) fn plain(message: impl Into<String>) -> Self {
        Self { word: None, message: message.into(), code: exit::Code::ERROR }
    }

    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self { word: None, message: message.into(), code: exit::Code::USAGE }
    }

    pub(crate) fn unreachable(message: impl Into<String>) -> Self {
        Self { word: Some("unreachable".to_owned()), message: message.into(), code: exit::Code::UNREACHABLE }
    }

    /// Somebody at the terminal had enough.
    pub(crate) fn interrupted() -> Self {
        Self { code: exit::Code::INTERRUPTED, ..Self::plain("interrupted") }
    }

    /// What a coordinator answered.
    pub(crate) fn from_status(status: &Status) -> Self {
        let word = error_code(status);
        let code = match (status.code(), word) {
            (Code::NotFound, _) => exit::Code::NOT_FOUND,
            (Code::Unavailable, _) => exit::Code::UNREACHABLE,
            _ => exit::Code::ERROR,
        };
        let field = metadata(status, "field").filter(|field| !status.message().starts_with(field.as_str()));
        let message = match field {
            Some(field) => format!("{field}: {}", status.message()),
            None if status.message().is_empty() => status.code().description().to_owned(),
            None => status.message().to_owned(),
        };
        Self { word: word.map(ErrorCode::as_str).map(str::to_owned), message, code }
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        Self::from_status(&status)
    }
}

impl From<InvalidField> for Failure {
    fn from(invalid: InvalidField) -> Self {
        Self { word: Some(ErrorCode::InvalidField.as_str().to_owned()), ..Self::usage(invalid.to_string()) }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::plain(format!("{error:#}"))
    }
}
