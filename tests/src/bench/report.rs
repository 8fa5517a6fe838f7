//! Results as files: `NAME.json` with everything, `NAME.svg` to look at, and `results.md` with a table over all names that were run.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::Context as _;

use super::Settings;
use super::figure::{Figure, Row};
use super::machine::Machine;
use super::plot;

/// Writes `NAME.json` and `NAME.svg`.
///
/// # Errors
/// What the file system says.
pub fn write_one(out: &Path, figure: &Figure, machine: &Machine, settings: &Settings) -> anyhow::Result<()> {
    let mut all = figure.json();
    all["machine"] = machine.json();
    all["quick"] = settings.quick.into();
    let text = serde_json::to_string_pretty(&all)?;
    write(&out.join(format!("{}.json", figure.name)), &(text + "\n"))?;
    write(&out.join(format!("{}.svg", figure.name)), &plot::svg(figure)?)
}

/// Writes `results.md`.
///
/// # Errors
/// What the file system says.
pub fn write_table(out: &Path, figures: &[(Figure, Machine)], settings: &Settings) -> anyhow::Result<()> {
    write(&out.join("results.md"), &table(figures, settings)?)
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
    }
    fs::write(path, text).with_context(|| path.display().to_string())
}

fn table(figures: &[(Figure, Machine)], settings: &Settings) -> anyhow::Result<String> {
    let mut text = String::from("# Results of cargo bench-cluster\n\n");
    if settings.quick {
        text.push_str("A quick run: it shows that all works, and its figures are not to be quoted.\n\n");
    }
    text.push_str(
        "Medians of pairs taken in turns; a ratio is ours to the peer's, `worst` the pair that is worst for us.\n\n",
    );
    text.push_str(
        "| name | what | ours | peer | ratio | worst | limit | pairs | goal |\n|---|---|---|---|---|---|---|---|---|\n",
    );
    for (figure, _) in figures {
        for row in &figure.rows {
            writeln!(text, "| {} | {} | {} |", figure.name, row.what, cells(row).join(" | "))?;
        }
    }
    for (figure, machine) in figures {
        writeln!(text, "\n## {}\n\n- peer: {}\n- machine: {}", figure.name, figure.peer, machine.line())?;
        if let Some(busy) = machine.busy() {
            writeln!(text, "- {busy}")?;
        }
        for limit in figure.rows.iter().filter_map(|row| row.limit.map(|(_, what)| (&row.what, what))) {
            writeln!(text, "- limit of {}: {}", limit.0, limit.1)?;
        }
        writeln!(text, "- history: {}", figure.history)?;
        figure.times.iter().try_for_each(|times| writeln!(text, "- {times}"))?;
        figure.notes.iter().try_for_each(|note| writeln!(text, "- {note}"))?;
    }
    Ok(text)
}

fn cells(row: &Row) -> [String; 7] {
    let ratio = |ratio: Option<f64>| ratio.map_or("-".to_owned(), |ratio| format!("{ratio:.2}"));
    let limit = row.unit.show(row.limit.map(|(value, _)| value));
    let (ours, peer) = (row.unit.show(row.ours()), row.unit.show(row.peer()));
    [ours, peer, ratio(row.ratio()), ratio(row.worst()), limit, row.pairs.len().to_string(), row.verdicts().join("; ")]
}
