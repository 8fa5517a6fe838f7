//! `helix submit --batch`: one JSON spec a line over one stream, answered a line each in the same order.
//!
//! A line without an id is given one here, so that what is sent again after a fail-over starts nothing twice.

use std::collections::{BTreeMap, VecDeque};
use std::io::BufRead;
use std::path::Path;

use futures::StreamExt;
use helix_common::endpoints::{Verdict, judge};
use helix_common::status::{error_code, status};
use helix_model::limits::SPEC_BYTES_MAX;
use helix_model::{ErrorCode, parse};
use helix_proto::v1::{self, spec_details};
use prost::Message;
use serde::Deserialize;
use serde_json::json;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::connection::{Connection, builds, new_build_id};
use crate::context::ContextOptions;
use crate::exit::{self, Code};
use crate::failure::Failure;
use crate::output::{Format, Item, Output};
use crate::verb::{submit, wait};

/// Submits that may be under way at once; bounds memory, not speed.
const IN_FLIGHT_MAX: usize = 4096;

/// A line of a batch: the long flags, with `_` for `-`.
#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct Line {
    id: Option<String>,
    repo: String,
    r#ref: String,
    executor: String,
    file: String,
    target: String,
    build_arg: BTreeMap<String, String>,
    platform: Vec<String>,
    output: Vec<String>,
    no_output: bool,
    env: BTreeMap<String, String>,
    label: BTreeMap<String, String>,
    require: BTreeMap<String, String>,
    secret: Vec<String>,
    timeout: Option<String>,
    silence_timeout: Option<String>,
    priority: i32,
    cpu: Option<serde_json::Number>,
    memory: Option<SizeText>,
    disk: Option<SizeText>,
    park: bool,
    retries: u32,
    on_worker_loss: String,
    push: String,
    keep_workdir: Option<String>,
    command: Option<String>,
    argv: Option<Vec<String>>,
}

/// The keys of a [`Line`], to name the one that was meant.
const KEYS: [&str; 27] = [
    "id",
    "repo",
    "ref",
    "executor",
    "file",
    "target",
    "build_arg",
    "platform",
    "output",
    "no_output",
    "env",
    "label",
    "require",
    "secret",
    "timeout",
    "silence_timeout",
    "priority",
    "cpu",
    "memory",
    "disk",
    "park",
    "retries",
    "on_worker_loss",
    "push",
    "keep_workdir",
    "command",
    "argv",
];

/// A size as a number of bytes or as text.
#[derive(Deserialize)]
#[serde(untagged)]
enum SizeText {
    Bytes(u64),
    Text(String),
}

impl SizeText {
    fn bytes(field: &'static str, size: Option<Self>) -> Result<u64, Failure> {
        match size {
            None => Ok(0),
            Some(Self::Bytes(bytes)) => Ok(bytes),
            Some(Self::Text(text)) => Ok(parse::size_bytes(field, &text)?),
        }
    }
}

fn duration(field: &'static str, text: Option<String>) -> Result<u64, Failure> {
    Ok(text.map(|text| parse::duration_ms(field, &text)).transpose()?.unwrap_or(0))
}

fn request_of(text: &str) -> Result<v1::SubmitBuildRequest, Failure> {
    // A JSON array would be read as the fields in order.
    if !text.trim_start().starts_with('{') {
        return Err(Failure::usage("a line is one JSON object"));
    }
    let line: Line = serde_json::from_str(text).map_err(|error| Failure::usage(what_is_wrong(text, &error)))?;
    let command = match (line.command, line.argv) {
        (Some(_), Some(_)) => return Err(Failure::usage("command and argv are both given")),
        (Some(shell), None) => Some(spec_details::Command::Shell(shell)),
        (None, Some(words)) => Some(spec_details::Command::Argv(v1::Argv { words })),
        (None, None) => None,
    };
    let details = v1::SpecDetails {
        executor: line.executor,
        target: line.target,
        platforms: line.platform,
        source: None,
        outputs: line.output,
        no_output: line.no_output,
        env: line.env,
        labels: line.label,
        requires: line.require,
        // As the flag has it, or the name alone.
        secrets: line.secret.iter().map(|name| name.strip_prefix("id=").unwrap_or(name).to_owned()).collect(),
        timeout_ms: duration("timeout", line.timeout)?,
        silence_timeout_ms: duration("silence_timeout", line.silence_timeout)?,
        priority: line.priority,
        cpu_milli: line
            .cpu
            .map(|cpu| submit::cpu_milli(&cpu.to_string()))
            .transpose()
            .map_err(Failure::usage)?
            .unwrap_or(0),
        memory_bytes: SizeText::bytes("memory", line.memory)?,
        disk_bytes: SizeText::bytes("disk", line.disk)?,
        park: line.park,
        retries: line.retries,
        on_worker_loss: line.on_worker_loss,
        push: line.push,
        keep_workdir_ms: duration("keep_workdir", line.keep_workdir)?,
        command,
    };
    let request = v1::SubmitBuildRequest {
        repo_url: line.repo,
        r#ref: line.r#ref,
        dockerfile_path: line.file,
        build_args: line.build_arg,
        build_id: line.id.unwrap_or_else(new_build_id),
        details: Some(details),
    };
    // One that is too large for a message would break the stream for all the others.
    if request.encoded_len() > 2 * SPEC_BYTES_MAX {
        let message = format!("{} bytes; a spec has at most {SPEC_BYTES_MAX}", request.encoded_len());
        return Err(Failure { word: Some(ErrorCode::SpecTooLarge.as_str().to_owned()), ..Failure::plain(message) });
    }
    Ok(request)
}

/// A line's error, with the key that was meant where one is not known.
fn what_is_wrong(text: &str, error: &serde_json::Error) -> String {
    let keys: serde_json::Map<String, serde_json::Value> = serde_json::from_str(text).unwrap_or_default();
    match keys.keys().find(|key| !KEYS.contains(&key.as_str())) {
        Some(key) => match helix_common::config::nearest(key, KEYS) {
            Some(meant) => format!("unknown key {key:?}; did you mean {meant:?}?"),
            None => format!("unknown key {key:?}; known: {}", KEYS.join(", ")),
        },
        None => error.to_string(),
    }
}

/// A line's fate: refused here, or sent and to be answered.
enum Entry {
    Refused(Failure),
    Sent(Box<v1::SubmitBuildRequest>),
}

pub(crate) async fn run(file: &Path, wait: bool, context: &ContextOptions, output: &Output) -> Result<Code, Failure> {
    let connection = Connection::open(context)?;
    let (lines_tx, mut lines) = mpsc::channel(IN_FLIGHT_MAX);
    let path = file.to_owned();
    let reader = tokio::task::spawn_blocking(move || read_lines(&path, &lines_tx));
    let mut report = Report { output, failed: false, accepted: Vec::new(), purged: Vec::new(), keep: wait, full: 0 };
    let mut unanswered: VecDeque<Entry> = VecDeque::new();
    loop {
        if unanswered.is_empty() {
            match lines.recv().await {
                Some(entry) => unanswered.push_back(entry),
                None => break,
            }
        }
        // A stream that breaks leaves its unanswered lines here; they are sent again, under the same ids, on the next.
        stream_once(&connection, &mut lines, &mut unanswered, &mut report).await?;
    }
    reader.await.map_err(|error| Failure::plain(format!("reading {}: {error}", file.display())))??;
    let mut code = if report.failed { Code::ERROR } else { Code::SUCCESS };
    for state in report.purged.drain(..) {
        if wait && code == Code::SUCCESS {
            code = exit::of_build(&v1::BuildStatus { state, ..v1::BuildStatus::default() });
        }
    }
    for id in std::mem::take(&mut report.accepted) {
        match wait::until_ended(&connection, &id).await {
            Ok(ended) if code == Code::SUCCESS => code = exit::of_build(&ended),
            Ok(_) => {}
            // One that was purged meanwhile; the others are waited for.
            Err(failure) if failure.code == Code::NOT_FOUND => code = output.one_of_several(&id, &failure, code),
            Err(failure) => return Err(failure),
        }
    }
    Ok(code)
}

fn read_lines(path: &Path, lines: &mpsc::Sender<Entry>) -> Result<(), Failure> {
    let broken = |error: std::io::Error| Failure::plain(format!("cannot read {}: {error}", path.display()));
    let input: Box<dyn BufRead> = if path == Path::new("-") {
        Box::new(std::io::stdin().lock())
    } else {
        Box::new(std::io::BufReader::new(std::fs::File::open(path).map_err(broken)?))
    };
    for (number, line) in (1u64..).zip(input.lines()) {
        let line = line.map_err(broken)?;
        if line.trim().is_empty() {
            continue;
        }
        let entry = match request_of(&line) {
            Ok(request) => Entry::Sent(Box::new(request)),
            Err(failure) => {
                let message = format!("line {number}: {}", failure.message);
                Entry::Refused(Failure { message, ..failure })
            }
        };
        if lines.blocking_send(entry).is_err() {
            break;
        }
    }
    Ok(())
}

/// Runs one stream until the input ends or the stream breaks.
async fn stream_once(
    connection: &Connection,
    lines: &mut mpsc::Receiver<Entry>,
    unanswered: &mut VecDeque<Entry>,
    report: &mut Report<'_>,
) -> Result<(), Failure> {
    let (requests_tx, requests) = mpsc::channel::<v1::SubmitBuildRequest>(IN_FLIGHT_MAX);
    for request in unanswered.iter().filter_map(sendable) {
        // There is room for all: no more than this may be unanswered.
        if requests_tx.try_send(request).is_err() {
            return Err(Failure::plain("more lines under way than may be"));
        }
    }
    let call = |channel| async move { builds(channel).submit_builds(ReceiverStream::new(requests)).await };
    let mut answers = match connection.once(call).await {
        Ok(answers) => answers.into_inner(),
        Err(status) => return connection.pause_or_fail(status).await,
    };
    let mut sender = Some(requests_tx);
    loop {
        report.drain_refused(unanswered);
        if sender.is_none() && unanswered.is_empty() {
            return Ok(());
        }
        tokio::select! {
            answer = answers.next(), if !unanswered.is_empty() => match answer {
                Some(Ok(result)) => {
                    if let Some(passing) = passing(&result) && !report.all_are_full(&passing, connection.coordinators()) {
                        return connection.pause_or_fail(passing).await;
                    }
                    unanswered.pop_front();
                    report.answer(&result);
                    connection.succeeded();
                }
                Some(Err(status)) => return connection.pause_or_fail(status).await,
                None => return connection.pause_or_fail(Status::unavailable("the stream ended early")).await,
            },
            entry = lines.recv(), if sender.is_some() && unanswered.len() < IN_FLIGHT_MAX => match (entry, &sender) {
                (Some(entry), Some(requests)) => {
                    let request = sendable(&entry);
                    unanswered.push_back(entry);
                    if let Some(request) = request && requests.send(request).await.is_err() {
                        return Ok(());
                    }
                }
                _ => sender = None,
            },
        }
    }
}

/// The refusal of a line that says nothing of the line, but of the coordinator or the moment: the stream goes on elsewhere, as a single
/// submit does.
fn passing(result: &v1::SubmitBuildResult) -> Option<Status> {
    let error = result.error.as_ref()?;
    let status = match ErrorCode::ALL.iter().find(|code| code.as_str() == error.reason) {
        Some(code) => status(*code, error.message.clone()),
        None => Status::new(error.code.into(), error.message.clone()),
    };
    (judge(&status) != Verdict::Final).then_some(status)
}

fn sendable(entry: &Entry) -> Option<v1::SubmitBuildRequest> {
    match entry {
        Entry::Refused(_) => None,
        Entry::Sent(request) => Some((**request).clone()),
    }
}

/// Prints answers in the order of the lines.
struct Report<'a> {
    output: &'a Output,
    failed: bool,
    accepted: Vec<String>,
    /// How those ended that had been submitted before, and are purged.
    purged: Vec<String>,
    keep: bool,
    /// Refusals in a row for a full disk.
    full: usize,
}

impl Report<'_> {
    /// Whether this refusal is for a full disk, and each coordinator has had its turn to say so: that is an answer, and waiting does
    /// not change it.
    fn all_are_full(&mut self, refusal: &Status, coordinators: usize) -> bool {
        let is_full = error_code(refusal) == Some(ErrorCode::DiskReserve);
        self.full = if is_full { self.full + 1 } else { 0 };
        is_full && self.full >= coordinators
    }

    /// Prints the refused lines that are next in order.
    fn drain_refused(&mut self, unanswered: &mut VecDeque<Entry>) {
        while let Some(Entry::Refused(failure)) = unanswered.front() {
            self.error(failure.word.as_deref().unwrap_or("invalid_line"), &failure.message);
            unanswered.pop_front();
        }
    }

    fn answer(&mut self, result: &v1::SubmitBuildResult) {
        match (&result.response, &result.error) {
            (Some(response), _) => {
                self.full = 0;
                let Item { name, json, .. } = submit::submitted(response);
                match self.output.format {
                    Format::Table | Format::Quiet => self.output.line(&name),
                    Format::Json | Format::Jsonl => self.output.line(&json.to_string()),
                }
                if !response.purged_state.is_empty() {
                    // There is nothing to wait for, and no more is known of how it ended.
                    self.purged.push(response.purged_state.clone());
                } else if self.keep {
                    self.accepted.push(name);
                }
            }
            (None, Some(error)) => {
                let field = if error.field.is_empty() || error.message.starts_with(&error.field) {
                    String::new()
                } else {
                    format!("{}: ", error.field)
                };
                self.error(&error.reason, &format!("{field}{}", error.message));
            }
            (None, None) => self.error("internal", "the coordinator sent an empty answer"),
        }
    }

    fn error(&mut self, word: &str, message: &str) {
        self.failed = true;
        match self.output.format {
            Format::Table | Format::Quiet => self.output.line(&format!("error: {word}: {message}")),
            Format::Json | Format::Jsonl => self.output.line(&json!({ "error": word, "message": message }).to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_holds_the_long_flags() {
        let request = request_of(
            r#"{"id":"a","command":"true","no_output":true,"build_arg":{"K":"V"},"timeout":"1m","cpu":0.5,"memory":"1GiB","disk":5}"#,
        )
        .unwrap();
        let details = request.details.unwrap();
        assert_eq!((request.build_id.as_str(), details.timeout_ms, details.cpu_milli), ("a", 60_000, 500));
        assert_eq!((details.memory_bytes, details.disk_bytes), (1 << 30, 5));
        assert_eq!(request.build_args["K"], "V");
        assert_eq!(details.command, Some(spec_details::Command::Shell("true".into())));
    }

    #[test]
    fn a_full_disk_is_an_answer_when_all_coordinators_have_one() {
        let output = Output::new(Format::Table, crate::output::ColorChoice::Never);
        let mut report =
            Report { output: &output, failed: false, accepted: Vec::new(), purged: Vec::new(), keep: false, full: 0 };
        let refused = |code: ErrorCode| {
            let error = v1::BatchError { reason: code.as_str().to_owned(), ..v1::BatchError::default() };
            passing(&v1::SubmitBuildResult { error: Some(error), ..v1::SubmitBuildResult::default() })
        };
        assert!(refused(ErrorCode::InvalidField).is_none() && refused(ErrorCode::QueueFull).is_none());
        let (full, moment) = (refused(ErrorCode::DiskReserve).unwrap(), refused(ErrorCode::NoLeader).unwrap());
        let said = [&full, &moment, &full, &full, &full, &full].map(|refusal| report.all_are_full(refusal, 3));
        assert_eq!(said, [false, false, false, false, true, true]);
    }

    #[test]
    fn what_is_wrong_with_a_line_is_said() {
        let misspelt = request_of(r#"{"comand":"true"}"#).unwrap_err().message;
        assert_eq!(misspelt, r#"unknown key "comand"; did you mean "command"?"#);
        assert!(request_of(r#"{"colour":"red"}"#).unwrap_err().message.contains("known: id, repo"));
        for key in KEYS {
            let error =
                request_of(&format!(r#"{{"{key}":{{"a":[]}}}}"#)).err().map_or_else(String::new, |error| error.message);
            assert!(!error.contains("unknown"), "{key}: {error}");
        }
        assert!(request_of(r#"{"command":"a","argv":["b"]}"#).unwrap_err().message.contains("both"));
        assert!(request_of(r#"{"timeout":"5"}"#).unwrap_err().message.contains("timeout"));
        assert!(request_of("nonsense").is_err() && request_of("[]").is_err());
        let huge = format!(r#"{{"command":"{}"}}"#, "x".repeat(200_000));
        assert_eq!(request_of(&huge).unwrap_err().word.as_deref(), Some("spec_too_large"));
        assert!(!request_of(r#"{"argv":["b"]}"#).unwrap().build_id.is_empty());
        let secrets = request_of(r#"{"argv":["b"],"secret":["id=a","b"]}"#).unwrap().details.unwrap().secrets;
        assert_eq!(secrets, ["a", "b"]);
    }
}
