//! Everything that is printed goes through here: data to stdout, talk to stderr.

#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use clap::ValueEnum;
use comfy_table::{ContentArrangement, Table, presets};
use jiff::Timestamp;
use serde_json::Value;

use crate::exit::Code;
use crate::failure::Failure;

/// How data is printed.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum, Debug)]
pub(crate) enum Format {
    /// For people
    Table,
    /// One JSON document
    Json,
    /// One JSON object a line
    Jsonl,
    /// Ids alone
    Quiet,
}

/// When colour is used.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum, Debug)]
pub(crate) enum ColorChoice {
    Auto,
    Always,
    Never,
}

/// Where and how this command prints.
pub(crate) struct Output {
    pub(crate) format: Format,
    color: bool,
}

impl Output {
    pub(crate) fn new(format: Format, choice: ColorChoice) -> Self {
        let wanted = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        let color = match choice {
            ColorChoice::Auto => wanted && std::io::stdout().is_terminal(),
            ColorChoice::Always => true,
            ColorChoice::Never => false,
        };
        Self { format, color }
    }

    /// Data that is one line of text.
    pub(crate) fn line(&self, text: &str) {
        self.bytes(text.as_bytes());
    }

    /// Data that is one line of bytes, as they are.
    pub(crate) fn bytes(&self, bytes: &[u8]) {
        let mut out = std::io::stdout().lock();
        let written = out.write_all(bytes).and_then(|()| out.write_all(b"\n"));
        leave_if_nobody_reads(written);
    }

    /// Many lines at once, each with its newline already.
    pub(crate) fn block(&self, bytes: &[u8]) {
        let mut out = std::io::stdout().lock();
        leave_if_nobody_reads(out.write_all(bytes).and_then(|()| out.flush()));
    }

    /// Talk, for people: never data.
    pub(crate) fn say(&self, text: &str) {
        eprintln!("{text}");
    }

    /// Prints items in the chosen format: rows of a table, JSON, or their names alone.
    pub(crate) fn items(&self, header: &[&str], items: &[Item]) {
        match self.format {
            Format::Table => self.table(header, items),
            Format::Json => {
                let all: Vec<&Value> = items.iter().map(|item| &item.json).collect();
                self.json(&all);
            }
            Format::Jsonl => items.iter().for_each(|item| self.line(&item.json.to_string())),
            Format::Quiet => items.iter().for_each(|item| self.line(&item.name)),
        }
    }

    /// Prints one thing: `table` for people, else as [`Output::items`] does, though without an array around it.
    pub(crate) fn item(&self, item: &Item, table: &str) {
        match self.format {
            Format::Table => self.line(table.trim_end()),
            Format::Json => self.json(&item.json),
            Format::Jsonl => self.line(&item.json.to_string()),
            Format::Quiet => self.line(&item.name),
        }
    }

    fn json(&self, value: &impl serde::Serialize) {
        let text = serde_json::to_string_pretty(value).unwrap_or_else(|error| format!("{{\"error\": \"{error}\"}}"));
        self.line(&text);
    }

    fn table(&self, header: &[&str], items: &[Item]) {
        let mut table = Table::new();
        table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
        table.set_header(header.iter().map(|name| name.to_uppercase()));
        for item in items {
            table.add_row(item.cells.iter().map(|cell| if cell.is_empty() { "-" } else { cell }));
        }
        let plain = table.to_string();
        let lines: Vec<String> =
            plain.lines().map(|line| self.paint_state(line.trim_end().trim_start_matches(' '))).collect();
        self.line(&lines.join("\n"));
    }

    /// Colours the first word of a line that is a state.
    fn paint_state(&self, line: &str) -> String {
        if !self.color {
            return line.to_owned();
        }
        let colors = [("succeeded", 32), ("failed", 31), ("running", 36), ("cancelled", 33), ("queued", 34)];
        let hit = colors.iter().find(|(word, _)| line.split_whitespace().any(|part| part == *word));
        match hit {
            Some((word, color)) => line.replacen(word, &format!("\u{1b}[{color}m{word}\u{1b}[0m"), 1),
            None => line.to_owned(),
        }
    }

    /// Says what went wrong with one of several things asked for; the others go on. The first failure's code counts.
    pub(crate) fn one_of_several(&self, which: &str, failure: &Failure, so_far: Code) -> Code {
        self.complain(&Failure { message: format!("{which}: {}", failure.message), ..failure.clone() });
        if so_far == Code::SUCCESS { failure.code } else { so_far }
    }

    /// Says what went wrong and turns it into the exit code.
    pub(crate) fn failed(&self, failure: &Failure) -> ExitCode {
        self.complain(failure);
        failure.code.into()
    }

    fn complain(&self, failure: &Failure) {
        if let (Format::Json | Format::Jsonl, word) = (self.format, &failure.word) {
            let word = word.as_deref().unwrap_or("error");
            eprintln!("{}", serde_json::json!({ "error": word, "message": failure.message }));
        } else {
            match &failure.word {
                Some(word) => eprintln!("helix: {word}: {}", failure.message),
                None => eprintln!("helix: {}", failure.message),
            }
        }
    }
}

/// A closed pipe (`helix list | head`) ends the command quietly; the data had a reader who had enough.
fn leave_if_nobody_reads(written: std::io::Result<()>) {
    if let Err(error) = written {
        let code = if error.kind() == std::io::ErrorKind::BrokenPipe { 0 } else { 1 };
        std::process::exit(code);
    }
}

/// One thing to print in any format.
pub(crate) struct Item {
    /// What quiet prints.
    pub(crate) name: String,
    pub(crate) cells: Vec<String>,
    pub(crate) json: Value,
}

/// Unix milliseconds as ISO 8601 in UTC; `null` for 0.
pub(crate) fn time_json(ms: i64) -> Value {
    if ms == 0 { Value::Null } else { Value::String(time_text(ms)) }
}

/// Unix milliseconds as ISO 8601 in UTC; empty for 0.
pub(crate) fn time_text(ms: i64) -> String {
    if ms == 0 {
        return String::new();
    }
    Timestamp::from_millisecond(ms).map_or_else(|_| ms.to_string(), |time| format!("{time:.3}"))
}

/// How long ago, for tables.
pub(crate) fn age_text(ms: i64) -> String {
    if ms == 0 {
        return String::new();
    }
    let seconds = (Timestamp::now().as_millisecond() - ms).max(0) / 1000;
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86_400 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// Text or `null`.
pub(crate) fn text_json(text: &str) -> Value {
    if text.is_empty() { Value::Null } else { Value::String(text.to_owned()) }
}

/// Bytes for people.
pub(crate) fn size_text(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes;
    let mut rest = 0;
    let mut unit = 0;
    while value >= 1024 && unit + 1 < units.len() {
        rest = value % 1024;
        value /= 1024;
        unit += 1;
    }
    if unit == 0 { format!("{value} B") } else { format!("{value}.{} {}", rest * 10 / 1024, units[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_iso_8601_in_utc() {
        assert_eq!(time_text(1_700_000_000_123), "2023-11-14T22:13:20.123Z");
        assert_eq!(time_json(0), Value::Null);
    }

    #[test]
    fn sizes_for_people() {
        assert_eq!(size_text(0), "0 B");
        assert_eq!(size_text(1536), "1.5 KiB");
        assert_eq!(size_text(10 << 30), "10.0 GiB");
    }
}
