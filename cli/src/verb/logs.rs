//! `helix logs`, and following as `submit --follow` does it.
//!
//! Lines are numbered per attempt, so that a stream that breaks goes on at the next number, wherever it is resumed.

use std::cell::Cell;
use std::time::{Duration, Instant};

use clap::Args;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use helix_proto::v1;
use serde_json::json;

use crate::connection::{Connection, builds};
use crate::context::ContextOptions;
use crate::exit::Code;
use crate::failure::Failure;
use crate::output::{Format, Output, text_json, time_json, time_text};
use crate::verb::{cancel, status, wait};

/// `helix logs`.
#[derive(Args)]
pub(crate) struct LogsArguments {
    /// A build id, a unique prefix of it, or `last`
    #[arg(value_name = "ID")]
    build: String,
    /// Go on until the build has ended
    #[arg(short = 'f', long)]
    follow: bool,
    /// Only the last N lines of what is there; with 0 and -f, only what comes
    #[arg(long, value_name = "N")]
    tail: Option<u64>,
    /// Only lines numbered N and up
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with = "tail")]
    since_seq: u64,
    /// Only the task of this platform
    #[arg(long, value_name = "P")]
    task: Option<String>,
    /// An attempt's number, or all [default: the latest]
    #[arg(long, value_name = "N|all", value_parser = attempts)]
    attempt: Option<Attempts>,
    /// Print when each line was said
    #[arg(long)]
    timestamps: bool,
    /// Answer from what the coordinator at hand knows, without asking the leader
    #[arg(long)]
    stale: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum Attempts {
    All,
    One(u32),
}

fn attempts(text: &str) -> Result<Attempts, String> {
    match text {
        "all" => Ok(Attempts::All),
        "0" => Err("attempts are numbered from 1".to_owned()),
        _ => text.parse().map(Attempts::One).map_err(|_| format!("{text:?} is neither a number nor all")),
    }
}

/// How much of an attempt's log is wanted.
#[derive(Clone, Copy)]
enum Part {
    /// What was asked for.
    Wanted,
    Whole,
}

/// Which lines of a task, and how they are printed.
struct Query<'a> {
    connection: &'a Connection,
    output: &'a Output,
    build: &'a str,
    task: usize,
    platform: String,
    prefix: bool,
    timestamps: bool,
    to_stdout: bool,
    follow: bool,
    tail: Option<u64>,
    since_seq: u64,
    stale: bool,
    /// Records printed; with `-o json` they are the elements of one array.
    printed: &'a Cell<u64>,
}

pub(crate) async fn run(arguments: LogsArguments, context: &ContextOptions, output: &Output) -> Result<Code, Failure> {
    if arguments.follow && output.format == Format::Json {
        return Err(Failure::usage("-o json is one document, and a log that is followed has no end yet: use -o jsonl"));
    }
    let connection = Connection::open(context)?;
    let id = connection.resolve_as(&arguments.build, arguments.stale).await?;
    let status = connection.status(&id, arguments.stale).await?;
    let wanted: Vec<usize> = match &arguments.task {
        None => (0..status.tasks.len()).collect(),
        Some(platform) => vec![status::task_of(&id, &status.tasks, platform)?],
    };
    let printed = Cell::new(0);
    let mut readers = FuturesUnordered::new();
    for index in wanted.iter().copied() {
        let query = Query {
            connection: &connection,
            output,
            build: &id,
            task: index,
            platform: status.tasks[index].platform.clone(),
            prefix: wanted.len() > 1,
            timestamps: arguments.timestamps,
            to_stdout: true,
            follow: arguments.follow,
            tail: arguments.tail,
            since_seq: arguments.since_seq,
            stale: arguments.stale,
            printed: &printed,
        };
        let attempt = arguments.attempt;
        if arguments.follow {
            readers.push(async move { query.run(attempt).await });
        } else if let Err(failure) = query.run(attempt).await {
            if printed.get() > 0 {
                output.block(b"\n]\n");
            }
            return Err(failure);
        }
    }
    if output.format == Format::Json {
        output.block(if printed.get() > 0 { b"\n]\n" } else { b"[]\n" });
    }
    let reading = async {
        while let Some(result) = readers.next().await {
            result?;
        }
        Ok::<(), Failure>(())
    };
    interruptible(&connection, &id, output, reading).await?;
    Ok(Code::SUCCESS)
}

/// Shows a build's log from its beginning until all of it was said.
pub(crate) async fn follow(connection: &Connection, id: &str, output: &Output) -> Result<(), Failure> {
    let printed = Cell::new(0);
    let tasks = connection.status(id, false).await?.tasks;
    let mut readers = FuturesUnordered::new();
    for (index, task) in tasks.iter().enumerate() {
        let query = Query {
            connection,
            output,
            build: id,
            task: index,
            platform: task.platform.clone(),
            prefix: tasks.len() > 1,
            timestamps: false,
            to_stdout: output.format == Format::Table,
            follow: true,
            tail: None,
            since_seq: 0,
            stale: false,
            printed: &printed,
        };
        readers.push(async move { query.run(Some(Attempts::All)).await });
    }
    while let Some(result) = readers.next().await {
        result?;
    }
    Ok(())
}

/// The first Ctrl-C detaches and says how to come back; a second one, within two seconds, cancels the build; a third does not
/// wait for its end.
pub(crate) async fn interruptible<T>(
    connection: &Connection,
    id: &str,
    output: &Output,
    watching: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    tokio::select! {
        result = watching => return result,
        _ = tokio::signal::ctrl_c() => {}
    }
    output.say(&format!("detached; build {id} goes on: helix logs -f {id}; Ctrl-C again cancels it"));
    let again = tokio::time::timeout(Duration::from_secs(2), tokio::signal::ctrl_c()).await;
    if again.is_ok() {
        let ending = async {
            cancel::request(connection, id, "interrupted at the terminal").await?;
            output.say(&format!("cancelling build {id}"));
            wait::until_ended(connection, id).await
        };
        tokio::select! {
            ended = ending => output.say(&wait::verdict(&ended?)),
            _ = tokio::signal::ctrl_c() => output.say(&format!("what came of it: helix status {id}")),
        }
    }
    Err(Failure::interrupted())
}

impl Query<'_> {
    /// Reads the attempts asked for, first to last; following goes on with attempts that begin meanwhile.
    async fn run(&self, attempts: Option<Attempts>) -> Result<(), Failure> {
        let there = match attempts {
            Some(Attempts::One(number)) => return self.attempt(number, Part::Wanted).await,
            Some(Attempts::All) | None => self.task_status().await?.attempt,
        };
        let mut next = if attempts.is_some() { 1 } else { there };
        let mut pause = Duration::from_millis(5);
        loop {
            let task = self.task_status().await?;
            if next == 0 {
                next = task.attempt;
            }
            if next > 0 && next <= task.attempt {
                // Of what came later nothing is old.
                self.attempt(next, if next > there { Part::Whole } else { Part::Wanted }).await?;
                next += 1;
                pause = Duration::from_millis(5);
                continue;
            }
            let ended = matches!(task.state.as_str(), "succeeded" | "failed" | "cancelled");
            if ended && task.attempt == 0 {
                // It never ran, and its log says why.
                return self.attempt(0, Part::Wanted).await;
            }
            if ended || !self.follow {
                return Ok(());
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(500));
        }
    }

    async fn task_status(&self) -> Result<v1::TaskStatus, Failure> {
        let status = self.connection.status(self.build, self.stale).await?;
        Ok(status.tasks.into_iter().nth(self.task).unwrap_or_default())
    }

    /// Reads one attempt's log to its end, resuming where a broken stream left off.
    async fn attempt(&self, attempt: u32, part: Part) -> Result<(), Failure> {
        let (tail, since_seq) = match part {
            Part::Wanted => (self.tail, self.since_seq),
            Part::Whole => (None, 0),
        };
        let mut request = v1::ReadLogRequest {
            build_id: self.build.to_owned(),
            task: u32::try_from(self.task).unwrap_or(u32::MAX),
            attempt,
            from_seq: since_seq,
            tail: tail.unwrap_or(0),
            follow: self.follow,
            stale: self.stale,
        };
        if tail == Some(0) {
            if !self.follow {
                return Ok(());
            }
            // Behind the last line that is there now.
            let mut last = 0;
            let look = v1::ReadLogRequest { tail: 1, follow: false, ..request.clone() };
            self.read(look, |chunk| last = chunk.records.last().map_or(last, |record| record.seq)).await?;
            request.from_seq = last + 1;
        }
        self.read(request, |chunk| self.print(attempt, chunk)).await
    }

    async fn read(&self, mut request: v1::ReadLogRequest, mut take: impl FnMut(&v1::LogChunk)) -> Result<(), Failure> {
        loop {
            let call = |channel| {
                let request = request.clone();
                async move { builds(channel).max_decoding_message_size(8 << 20).read_log(request).await }
            };
            let mut stream = self.connection.call(call).await?.into_inner();
            let opened = Instant::now();
            loop {
                match stream.message().await {
                    Ok(Some(chunk)) => {
                        self.connection.succeeded();
                        take(&chunk);
                        if let Some(last) = chunk.records.last() {
                            request.from_seq = last.seq + 1;
                            request.tail = 0;
                        }
                    }
                    Ok(None) => return Ok(()),
                    Err(status) => {
                        self.connection.lasted(opened);
                        self.connection.pause_or_fail(status).await?;
                        break;
                    }
                }
            }
        }
    }

    fn print(&self, attempt: u32, chunk: &v1::LogChunk) {
        let as_json = self.to_stdout && matches!(self.output.format, Format::Json | Format::Jsonl);
        let mut block = Vec::with_capacity(chunk.records.iter().map(|record| record.data.len() + 32).sum());
        let as_array = as_json && self.output.format == Format::Json;
        for record in &chunk.records {
            if as_array {
                block.extend_from_slice(if self.printed.replace(self.printed.get() + 1) > 0 {
                    b",\n  "
                } else {
                    b"[\n  "
                });
            }
            if as_json {
                let line = json!({
                    "build_id": self.build,
                    "task": text_json(&self.platform),
                    "attempt": attempt,
                    "seq": record.seq,
                    "time": time_json(record.time_ms),
                    "stream": stream_word(record.stream()),
                    "line": String::from_utf8_lossy(&record.data),
                });
                block.extend_from_slice(line.to_string().as_bytes());
            } else {
                if self.timestamps {
                    block.extend_from_slice(time_text(record.time_ms).as_bytes());
                    block.push(b' ');
                }
                if self.prefix {
                    block.extend_from_slice(format!("[{}] ", self.platform).as_bytes());
                }
                if record.stream() == v1::LogStream::System {
                    block.extend_from_slice(b"helix: ");
                }
                block.extend_from_slice(&record.data);
            }
            if !as_array {
                block.push(b'\n');
            }
        }
        if self.to_stdout {
            self.output.block(&block);
        } else {
            let text = String::from_utf8_lossy(&block);
            self.output.say(text.strip_suffix('\n').unwrap_or(&text));
        }
    }
}

fn stream_word(stream: v1::LogStream) -> &'static str {
    match stream {
        v1::LogStream::Stdout => "stdout",
        v1::LogStream::Stderr => "stderr",
        v1::LogStream::System | v1::LogStream::Unspecified => "system",
    }
}
