//! `helix top`: coordinators, workers and builds at one look, drawn anew again and again.

use std::cmp::Reverse;
use std::io::IsTerminal as _;
use std::pin::pin;
use std::time::Duration;

use clap::Args;
use helix_proto::v1;
use serde_json::json;
use tokio::time::{Instant, sleep};

use crate::connection::{Connection, cluster, workers};
use crate::context::{ContextOptions, duration};
use crate::exit::Code;
use crate::failure::Failure;
use crate::output::{Format, Item, Output, time_json, time_text};
use crate::screen::{self, Screen};
use crate::verb::{list, status, workers as worker};

/// Of the builds that run, and of those that wait, so many are asked for.
const BUILDS_MAX: u64 = 100;
/// How long nobody has to answer before that is said.
const PATIENCE: Duration = Duration::from_secs(1);
/// A cluster is not asked more often than this.
const INTERVAL_MIN: Duration = Duration::from_millis(100);

/// `helix top`.
#[derive(Args)]
pub(crate) struct TopArguments {
    /// How long to wait between two looks
    #[arg(long, value_name = "DUR", default_value = "2s", value_parser = interval)]
    interval: Duration,
    /// Print so many looks, one below the other, and end [default: until `q` or Ctrl-C; 1 where stdout is no
    /// terminal or another format is asked for]
    #[arg(short = 'n', long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
}

fn interval(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        short if short < INTERVAL_MIN => Err("is at least 100ms".to_owned()),
        interval => Ok(interval),
    }
}

pub(crate) async fn run(arguments: TopArguments, context: &ContextOptions, output: &Output) -> Result<Code, Failure> {
    let connection = Connection::open(context)?;
    let has_screen = output.format == Format::Table && std::io::stdout().is_terminal();
    match arguments.count {
        None if has_screen => watch(&connection, arguments.interval, output).await?,
        count => print(&connection, arguments.interval, count.unwrap_or(1), output).await?,
    }
    Ok(Code::SUCCESS)
}

async fn print(connection: &Connection, interval: Duration, count: u64, output: &Output) -> Result<(), Failure> {
    for number in 0..count {
        if number > 0 {
            sleep(interval).await;
        }
        let look = Look::take(connection).await?;
        match output.format {
            Format::Table if number > 0 => output.line(&format!("\n{}", look.frame(None, None, output).join("\n"))),
            Format::Table => output.line(&look.frame(None, None, output).join("\n")),
            Format::Quiet => output.items(&[], &look.builds.iter().map(status::item).collect::<Vec<_>>()),
            Format::Json | Format::Jsonl => output.item(&look.item(), ""),
        }
    }
    Ok(())
}

/// Draws until somebody ends it. What fails at first ends it, too; later it may come right again.
async fn watch(connection: &Connection, interval: Duration, output: &Output) -> Result<(), Failure> {
    let mut look = Look::take(connection).await?;
    let lost = |error| Failure::plain(format!("the terminal: {error}"));
    let screen = Screen::open().map_err(lost)?;
    let draw = |look: &Look, trouble: Option<&str>| {
        screen.draw(&look.frame(Some(Screen::height()), trouble, output)).map_err(lost)
    };
    let mut ended = pin!(screen::asked_to_end());
    let mut trouble = None;
    loop {
        draw(&look, trouble.as_deref())?;
        tokio::select! {
            result = &mut ended => return result.map_err(lost),
            () = sleep(interval) => {}
        }
        let asked = Instant::now();
        let mut looking = pin!(Look::take(connection));
        loop {
            tokio::select! {
                result = &mut ended => return result.map_err(lost),
                looked = &mut looking => {
                    trouble = match looked {
                        Ok(newer) => {
                            look = newer;
                            None
                        }
                        Err(failure) => Some(failure.message),
                    };
                    break;
                }
                () = sleep(PATIENCE) => {
                    let silent = format!("no answer for {} s", asked.elapsed().as_secs());
                    draw(&look, Some(trouble.as_deref().unwrap_or(&silent)))?;
                }
            }
        }
    }
}

/// What there was to be seen at one time.
struct Look {
    at_ms: i64,
    cluster: v1::ClusterStatus,
    workers: Vec<v1::WorkerStatus>,
    /// Those that run, then those that wait; of each the newest.
    builds: Vec<v1::BuildStatus>,
}

impl Look {
    async fn take(connection: &Connection) -> Result<Self, Failure> {
        let ask = |channel| async move {
            cluster(channel).get_cluster_status(v1::GetClusterStatusRequest { stale: false }).await
        };
        let cluster = connection.call(ask).await?.into_inner();
        let ask = |channel| async move { workers(channel).list_workers(v1::ListWorkersRequest {}).await };
        let mut workers = connection.call(ask).await?.into_inner().workers;
        workers.sort_by(|one, other| order(one).cmp(&order(other)));
        let mut builds = Vec::new();
        for state in ["running", "queued"] {
            builds.extend(in_state(connection, state).await?);
        }
        Ok(Self { at_ms: jiff::Timestamp::now().as_millisecond(), cluster, workers, builds })
    }

    /// As lines, no more than `height` if that is given. Of what does not fit, it is said how much there is.
    fn frame(&self, height: Option<usize>, trouble: Option<&str>, output: &Output) -> Vec<String> {
        let mut lines = Vec::new();
        lines.push(match trouble {
            Some(trouble) => format!("as of {}; {}", time_text(self.at_ms), trouble.replace('\n', " ")),
            None => format!("as of {}", time_text(self.at_ms)),
        });
        lines.extend(super::cluster::text(&self.cluster).lines().map(str::to_owned));
        let workers = self.workers.iter().map(worker::item).collect::<Vec<_>>();
        let workers = output.table_lines(&worker::HEADER, &workers);
        let builds = self.builds.iter().map(status::item).collect::<Vec<_>>();
        let builds = output.table_lines(&list::HEADER, &builds);
        let totals = self.cluster.totals.unwrap_or_default();
        let known = usize::try_from(totals.running + totals.queued).unwrap_or(usize::MAX);
        let height = height.unwrap_or(usize::MAX);
        // A blank line stands before each table.
        let room = height.saturating_sub(lines.len() + 2);
        let of_workers = workers.len().min((room / 2).max(room.saturating_sub(builds.len())));
        let all_workers = self.workers.len();
        lines.push(String::new());
        lines.extend(section(workers, all_workers, of_workers, "workers"));
        lines.push(String::new());
        lines.extend(section(builds, known.max(self.builds.len()), room - of_workers, "builds"));
        lines.truncate(height);
        lines
    }

    fn item(&self) -> Item {
        let objects = |items: Vec<Item>| items.into_iter().map(|item| item.json).collect::<Vec<_>>();
        Item {
            name: self.cluster.cluster.clone(),
            cells: Vec::new(),
            json: json!({
                "at": time_json(self.at_ms),
                "cluster": super::cluster::item(&self.cluster).json,
                "workers": objects(self.workers.iter().map(worker::item).collect()),
                "builds": objects(self.builds.iter().map(status::item).collect()),
            }),
        }
    }
}

/// Those that somebody should look after first, then the busiest.
fn order(worker: &v1::WorkerStatus) -> (bool, Reverse<u32>, &str) {
    (worker::standing(worker) == "healthy", Reverse(worker.load), &worker.name)
}

async fn in_state(connection: &Connection, state: &str) -> Result<Vec<v1::BuildStatus>, Failure> {
    let request =
        v1::ListBuildsRequest { states: vec![state.to_owned()], limit: BUILDS_MAX, ..v1::ListBuildsRequest::default() };
    list::ask(connection, &request).await
}

/// A table of `known` things, of which not all may be in it, in no more lines than there is room for.
fn section(mut table: Vec<String>, known: usize, room: usize, what: &str) -> Vec<String> {
    // Its first line is the header.
    let rows = table.len().saturating_sub(1);
    if known == 0 {
        table = vec![format!("no {what}")];
    } else if table.len() > room || rows < known {
        table.truncate(table.len().min(room.saturating_sub(1)));
        let shown = table.len().saturating_sub(1);
        table.push(format!("... and {} more {what}", known - shown));
    }
    table.truncate(room);
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::ColorChoice;

    fn look(workers: usize, builds: usize, known: u64) -> Look {
        let worker = |number| v1::WorkerStatus {
            name: format!("host-{number}"),
            standing: "present".to_owned(),
            healthy: true,
            load: 1,
            capacity: 4,
            ..v1::WorkerStatus::default()
        };
        let build = |number| v1::BuildStatus {
            build_id: format!("build-{number}"),
            state: "running".to_owned(),
            ..v1::BuildStatus::default()
        };
        let totals = v1::GetTotalsResponse { running: known, ..v1::GetTotalsResponse::default() };
        Look {
            at_ms: 1_700_000_000_123,
            cluster: v1::ClusterStatus { cluster: "here".to_owned(), totals: Some(totals), ..Default::default() },
            workers: (0..workers).map(worker).collect(),
            builds: (0..builds).map(build).collect(),
        }
    }

    fn frame(look: &Look, height: Option<usize>) -> Vec<String> {
        look.frame(height, None, &Output::new(Format::Table, ColorChoice::Never))
    }

    #[test]
    fn without_a_height_everything_is_shown() {
        let lines = frame(&look(30, 40, 40), None);
        assert_eq!(lines[0], "as of 2023-11-14T22:13:20.123Z");
        assert!(lines.iter().any(|line| line.starts_with("host-29 ")), "{lines:?}");
        assert!(lines.iter().any(|line| line.starts_with("build-39 ")), "{lines:?}");
        assert!(!lines.iter().any(|line| line.contains("more")), "{lines:?}");
    }

    #[test]
    fn what_does_not_fit_is_counted() {
        for height in 0..80 {
            let lines = frame(&look(30, 40, 40), Some(height));
            assert!(lines.len() <= height, "{height}: {lines:?}");
            let shown = |prefix| lines.iter().filter(|line| line.starts_with(prefix)).count();
            let more = |what| {
                let ends = format!("more {what}");
                let line = lines.iter().find(|line| line.ends_with(&ends))?;
                line.split_whitespace().nth(2)?.parse::<usize>().ok()
            };
            if height >= 20 {
                assert_eq!(shown("host-") + more("workers").unwrap_or(0), 30, "{height}: {lines:?}");
                assert_eq!(shown("build-") + more("builds").unwrap_or(0), 40, "{height}: {lines:?}");
            }
        }
    }

    #[test]
    fn few_workers_leave_the_room_to_builds() {
        let lines = frame(&look(2, 40, 500), Some(30));
        assert_eq!(lines.len(), 30, "{lines:?}");
        assert_eq!(lines.iter().filter(|line| line.starts_with("host-")).count(), 2, "{lines:?}");
        let builds = lines.iter().filter(|line| line.starts_with("build-")).count();
        assert_eq!(lines.last().unwrap(), &format!("... and {} more builds", 500 - builds));
    }

    #[test]
    fn an_empty_cluster_says_so() {
        let lines = frame(&look(0, 0, 0), Some(24));
        assert!(lines.contains(&"no workers".to_owned()) && lines.contains(&"no builds".to_owned()), "{lines:?}");
    }

    #[test]
    fn trouble_stands_beside_the_time_of_what_is_shown() {
        let output = Output::new(Format::Table, ColorChoice::Never);
        let lines = look(1, 1, 1).frame(Some(24), Some("no answer\nfor 3 s"), &output);
        assert_eq!(lines[0], "as of 2023-11-14T22:13:20.123Z; no answer for 3 s");
    }

    #[test]
    fn whoever_needs_help_stands_first() {
        let mut all = look(3, 0, 0).workers;
        all[1].load = 3;
        all[2].healthy = false;
        all.sort_by(|one, other| order(one).cmp(&order(other)));
        assert_eq!(all.iter().map(|worker| worker.name.as_str()).collect::<Vec<_>>(), ["host-2", "host-1", "host-0"]);
    }
}
