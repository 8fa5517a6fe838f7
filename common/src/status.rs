//! gRPC statuses with stable words: how an [`ErrorCode`] travels, and how the other side reads it.
//!
//! Every status made here carries `google.rpc.ErrorInfo` (domain `helix.build`, reason the code's word).
//! Texts are cut to [`TEXT_BYTES_MAX`]: details travel in trailers, and peers refuse large ones.

use std::collections::HashMap;
use std::time::Duration;

use helix_model::{ErrorCode, InvalidField};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

/// The domain in `google.rpc.ErrorInfo`.
pub const DOMAIN: &str = "helix.build";

/// The metadata key under which a `not_leader` carries the leader's endpoint.
pub const LEADER: &str = "leader";

/// The metadata key under which a `digest_mismatch` says whether part of the bytes came with an earlier upload.
pub const RESUMED: &str = "resumed";

/// The longest message or metadata value sent; header lists of 8 KiB are common limits.
pub const TEXT_BYTES_MAX: usize = 1024;

/// The status for a code.
#[must_use]
pub fn status(code: ErrorCode, message: impl Into<String>) -> Status {
    with_metadata(code, message, std::iter::empty::<(String, String)>())
}

/// The status for a code, with facts beside the message.
#[must_use]
pub fn with_metadata<K: Into<String>, V: Into<String>>(
    code: ErrorCode,
    message: impl Into<String>,
    metadata: impl IntoIterator<Item = (K, V)>,
) -> Status {
    let metadata: HashMap<String, String> =
        metadata.into_iter().map(|(key, value)| (key.into(), cut(value.into()))).collect();
    let mut details = ErrorDetails::with_error_info(code.as_str(), DOMAIN, metadata);
    if let Some(delay) = retry_delay(code) {
        details.set_retry_info(Some(delay));
    }
    Status::with_error_details(grpc_code(code), cut(message.into()), details)
}

/// The status for a malformed field, with `google.rpc.BadRequest`.
#[must_use]
pub fn invalid(field: &InvalidField) -> Status {
    let mut details = ErrorDetails::with_error_info(
        ErrorCode::InvalidField.as_str(),
        DOMAIN,
        HashMap::from([("field".to_owned(), field.field.to_owned())]),
    );
    details.add_bad_request_violation(field.field, cut(field.why.clone()));
    Status::with_error_details(Code::InvalidArgument, cut(field.to_string()), details)
}

/// "Ask the leader": `not_leader` with its endpoint, or `no_leader` when none is known.
#[must_use]
pub fn not_leader(leader: Option<&str>) -> Status {
    match leader {
        Some(endpoint) => {
            with_metadata(ErrorCode::NotLeader, format!("the leader is {endpoint}"), [(LEADER, endpoint)])
        }
        None => status(ErrorCode::NoLeader, "no leader is known; retry"),
    }
}

/// The word a status carries, if it is one of ours.
#[must_use]
pub fn error_code(status: &Status) -> Option<ErrorCode> {
    let info = status.get_details_error_info()?;
    if info.domain != DOMAIN {
        return None;
    }
    ErrorCode::ALL.iter().copied().find(|code| code.as_str() == info.reason)
}

/// A fact that a status of ours carries beside its message.
#[must_use]
pub fn metadata(status: &Status, key: &str) -> Option<String> {
    let mut info = status.get_details_error_info()?;
    if info.domain == DOMAIN { info.metadata.remove(key) } else { None }
}

/// The leader's endpoint, where a status carries one.
#[must_use]
pub fn leader_hint(status: &Status) -> Option<String> {
    metadata(status, LEADER).filter(|hint| !hint.is_empty())
}

/// Whether an upload that was gone on with was refused for the part that came earlier, which is gone now: the same upload is worth
/// beginning anew.
#[must_use]
pub fn is_worth_beginning_anew(status: &Status) -> bool {
    error_code(status) == Some(ErrorCode::DigestMismatch) && metadata(status, RESUMED).as_deref() == Some("true")
}

/// How long the server asks to wait before a retry.
#[must_use]
pub fn retry_after(status: &Status) -> Option<Duration> {
    status.get_details_retry_info()?.retry_delay
}

/// The gRPC code of an error code, as the error code's documentation gives it.
#[must_use]
pub fn grpc_code(code: ErrorCode) -> Code {
    match code {
        ErrorCode::InvalidField
        | ErrorCode::SpecTooLarge
        | ErrorCode::BuildAmbiguous
        | ErrorCode::DigestMismatch
        | ErrorCode::SnapshotInvalid => Code::InvalidArgument,
        ErrorCode::Unsatisfiable
        | ErrorCode::WrongState
        | ErrorCode::Expired
        | ErrorCode::PolicyChanged
        | ErrorCode::StaleAttempt
        | ErrorCode::VersionSkew
        | ErrorCode::MemberUnreachable
        | ErrorCode::NodeRemoved
        | ErrorCode::QuorumUnsafe
        | ErrorCode::LastMember
        | ErrorCode::LastCopy
        | ErrorCode::MembershipBusy
        | ErrorCode::QuorumMayLive
        | ErrorCode::UpgradePending
        | ErrorCode::BucketRefused
        | ErrorCode::WrongCluster => Code::FailedPrecondition,
        ErrorCode::BuildUnknown
        | ErrorCode::BuildPurged
        | ErrorCode::WorkerUnknown
        | ErrorCode::ArtifactUnknown
        | ErrorCode::MemberUnknown
        | ErrorCode::LogUnknown => Code::NotFound,
        ErrorCode::IdTaken | ErrorCode::WorkerNameTaken | ErrorCode::MemberExists | ErrorCode::NodeIdUsed => {
            Code::AlreadyExists
        }
        ErrorCode::QueueFull | ErrorCode::DiskReserve | ErrorCode::BlobTooLarge => Code::ResourceExhausted,
        ErrorCode::NoLeader
        | ErrorCode::NotLeader
        | ErrorCode::PeerUnreachable
        | ErrorCode::BucketUnreachable
        | ErrorCode::ShuttingDown
        | ErrorCode::BackupIncomplete => Code::Unavailable,
        ErrorCode::RoleNotAllowed | ErrorCode::NotOwner => Code::PermissionDenied,
        ErrorCode::IdentityInvalid => Code::Unauthenticated,
        ErrorCode::OutcomeUnknown => Code::Aborted,
        ErrorCode::Internal => Code::Internal,
    }
}

fn retry_delay(code: ErrorCode) -> Option<Duration> {
    match code {
        ErrorCode::QueueFull => Some(Duration::from_secs(1)),
        ErrorCode::DiskReserve => Some(Duration::from_secs(5)),
        // An election takes about this long.
        ErrorCode::NoLeader => Some(Duration::from_millis(200)),
        _ => None,
    }
}

fn cut(mut text: String) -> String {
    if text.len() > TEXT_BYTES_MAX {
        let mut end = TEXT_BYTES_MAX - '…'.len_utf8();
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_travels_under_the_grpc_code_its_documentation_gives() {
        let source = include_str!("../model/src/error.rs");
        for &code in ErrorCode::ALL {
            let status = status(code, "m");
            assert_eq!(error_code(&status), Some(code));
            let word = format!("= \"{}\";", code.as_str());
            let before = &source[..source.find(&word).unwrap()];
            let comment = before.rsplit("///").next().unwrap();
            let name = format!("{:?}", status.code());
            let upper = name.chars().fold(String::new(), |mut out, c| {
                if c.is_uppercase() && !out.is_empty() {
                    out.push('_');
                }
                out.push(c.to_ascii_uppercase());
                out
            });
            assert!(comment.contains(&upper), "{code}: {upper} is not in {comment:?}");
        }
    }

    #[test]
    fn hints_and_delays_read_back() {
        let status = not_leader(Some("https://a:1"));
        assert_eq!(leader_hint(&status).as_deref(), Some("https://a:1"));
        assert_eq!(retry_after(&status), None);
        let status = not_leader(None);
        assert_eq!((leader_hint(&status), error_code(&status)), (None, Some(ErrorCode::NoLeader)));
        assert!(retry_after(&status).is_some());
        let field = invalid(&InvalidField::new("repo_url", "is empty"));
        assert_eq!(field.get_details_bad_request().unwrap().field_violations[0].field, "repo_url");
        assert_eq!(field.message(), "repo_url: is empty");
    }

    #[test]
    fn statuses_of_others_and_broken_details_are_no_code_of_ours() {
        assert_eq!(error_code(&Status::unavailable("x")), None);
        assert_eq!(error_code(&Status::with_details(Code::Internal, "x", vec![0xff; 40].into())), None);
        let foreign = ErrorDetails::with_error_info("no_leader", "example.com", HashMap::new());
        assert_eq!(error_code(&Status::with_error_details(Code::Unavailable, "x", foreign)), None);
    }

    #[test]
    fn long_texts_are_cut_on_a_character() {
        let status = status(ErrorCode::Internal, "ä".repeat(TEXT_BYTES_MAX));
        assert!(status.message().len() <= TEXT_BYTES_MAX && status.message().ends_with('…'));
    }
}
