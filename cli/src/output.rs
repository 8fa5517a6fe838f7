//! Everything that is printed goes through here: data to stdout, talk to stderr.

use std::cell::Cell;
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
    /// What a closed pipe on stdout means.
    closed: Cell<Closed>,
}

/// What becomes of a command whose output nobody reads any more.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Closed {
    /// It ends, and well: the reader had enough (`helix list | head`).
    Ends,
    /// It goes on; nobody has closed it yet.
    GoesOn,
    /// It goes on and prints nothing.
    Mute,
}

impl Output {
    pub(crate) fn new(format: Format, choice: ColorChoice) -> Self {
        let wanted = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        let color = match choice {
            ColorChoice::Auto => wanted && std::io::stdout().is_terminal(),
            ColorChoice::Always => true,
            ColorChoice::Never => false,
        };
        Self { format, color, closed: Cell::new(Closed::Ends) }
    }

    /// Data that is one line of text.
    pub(crate) fn line(&self, text: &str) {
        self.bytes(text.as_bytes());
    }

    /// Data that is one line of bytes, as they are.
    pub(crate) fn bytes(&self, bytes: &[u8]) {
        let mut out = std::io::stdout().lock();
        self.written(out.write_all(bytes).and_then(|()| out.write_all(b"\n")));
    }

    /// Many lines at once, each with its newline already.
    pub(crate) fn block(&self, bytes: &[u8]) {
        let mut out = std::io::stdout().lock();
        self.written(out.write_all(bytes).and_then(|()| out.flush()));
    }

    /// From here on a closed pipe ends only the printing: what the command exits with is still wanted.
    pub(crate) fn outlive_reader(&self) {
        self.closed.set(Closed::GoesOn);
    }

    fn written(&self, written: std::io::Result<()>) {
        let Err(error) = written else { return };
        match (error.kind() == std::io::ErrorKind::BrokenPipe, self.closed.get()) {
            (true, Closed::Ends) => std::process::exit(0),
            (true, Closed::GoesOn) => self.closed.set(Closed::Mute),
            (true, Closed::Mute) => {}
            (false, _) => {
                self.say(&format!("helix: cannot write to stdout: {error}"));
                std::process::exit(1)
            }
        }
    }

    /// Talk, for people: never data.
    pub(crate) fn say(&self, text: &str) {
        // Where nobody listens, what was asked for is done all the same.
        let _ = writeln!(std::io::stderr(), "{text}");
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

    /// Prints what was found of so many things that were asked for: of one thing the thing, of several always an array, however
    /// many of them were found. Nothing as a table: that is the caller's to say.
    pub(crate) fn asked_for(&self, asked: usize, items: &[Item]) {
        match (self.format, items) {
            (Format::Table, _) => {}
            (_, []) if asked == 1 => {}
            (_, [only]) if asked == 1 => self.item(only, ""),
            _ => self.items(&[], items),
        }
    }

    fn json(&self, value: &impl serde::Serialize) {
        let text = serde_json::to_string_pretty(value).unwrap_or_else(|error| format!("{{\"error\": \"{error}\"}}"));
        self.line(&text);
    }

    fn table(&self, header: &[&str], items: &[Item]) {
        self.line(&self.table_lines(header, items).join("\n"));
    }

    /// A table for people, its header first.
    pub(crate) fn table_lines(&self, header: &[&str], items: &[Item]) -> Vec<String> {
        let mut table = Table::new();
        table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
        table.set_header(header.iter().map(|name| name.to_uppercase()));
        for item in items {
            table.add_row(item.cells.iter().map(|cell| if cell.is_empty() { "-" } else { cell }));
        }
        let plain = table.to_string();
        plain.lines().map(|line| self.paint_state(line.trim_end().trim_start_matches(' '))).collect()
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
            self.say(&serde_json::json!({ "error": word, "message": failure.message }).to_string());
        } else {
            match &failure.word {
                Some(word) => self.say(&format!("helix: {word}: {}", failure.message)),
                None => self.say(&format!("helix: {}", failure.message)),
            }
        }
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
