//! What a measurement came to: pairs taken in turns, their medians and worst, percentiles, and the limit of the machine.

use std::fmt;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde_json::{Value, json};

use super::machine::Machine;

/// The percentiles that are told.
pub(super) const PERCENTILES: [f64; 8] = [50.0, 75.0, 90.0, 95.0, 99.0, 99.9, 99.99, 100.0];

/// The longest time that a histogram can hold.
const LONGEST: Duration = Duration::from_secs(600);

/// What a number is of. Of rates more is better, of all others less.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unit {
    /// Milliseconds.
    Ms,
    /// Per second.
    PerSecond,
    /// Million bytes per second.
    MegabytesPerSecond,
    /// 1,048,576 bytes.
    Mebibytes,
    /// Bytes.
    Bytes,
    /// Hundredths of a core.
    PercentOfCore,
}

impl Unit {
    /// Whether a bigger number is a better one.
    #[must_use]
    pub fn more_is_better(self) -> bool {
        matches!(self, Self::PerSecond | Self::MegabytesPerSecond)
    }

    /// As it is printed behind a number.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Ms => "ms",
            Self::PerSecond => "/s",
            Self::MegabytesPerSecond => "MB/s",
            Self::Mebibytes => "MiB",
            Self::Bytes => "B",
            Self::PercentOfCore => "%",
        }
    }

    /// A number with its unit; `-` for none.
    #[must_use]
    pub fn show(self, value: Option<f64>) -> String {
        match value {
            None => "-".to_owned(),
            Some(value) if value.abs() < 10.0 => format!("{value:.3}{}", self.word()),
            Some(value) if value.abs() < 1000.0 => format!("{value:.1}{}", self.word()),
            Some(value) => format!("{value:.0}{}", self.word()),
        }
    }
}

/// Ours and a peer's, one right after the other.
#[derive(Clone, Copy, Debug)]
pub struct Pair {
    /// Ours.
    pub ours: f64,
    /// The peer's, where there is one.
    pub peer: Option<f64>,
}

impl Pair {
    fn ratio(&self) -> Option<f64> {
        self.peer.filter(|peer| *peer > 0.0).map(|peer| self.ours / peer)
    }
}

/// What a row is to come to: at least that of a rate, at most that of all else.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Goal {
    /// Our median, in the row's unit.
    Value(f64),
    /// The median of the pairs' ratios.
    Ratio(f64),
}

/// One thing that was measured.
#[derive(Clone, Debug)]
pub struct Row {
    /// What, in a few words.
    pub what: String,
    /// The unit of all its numbers.
    pub unit: Unit,
    /// In the order in which they were taken.
    pub pairs: Vec<Pair>,
    /// What the machine itself allows, and what that is.
    pub limit: Option<(f64, &'static str)>,
    /// What it is to come to.
    pub goals: Vec<Goal>,
}

impl Row {
    /// A row of pairs.
    pub fn new(what: impl Into<String>, unit: Unit, pairs: Vec<Pair>) -> Self {
        Self { what: what.into(), unit, pairs, limit: None, goals: Vec::new() }
    }

    /// With the machine's limit.
    #[must_use]
    pub fn limit(mut self, value: f64, what: &'static str) -> Self {
        self.limit = Some((value, what));
        self
    }

    /// With what it is to come to, besides other goals.
    #[must_use]
    pub fn goal(mut self, goal: Goal) -> Self {
        self.goals.push(goal);
        self
    }

    /// Each goal in words, and whether it is met.
    #[must_use]
    pub fn verdicts(&self) -> Vec<String> {
        let side = if self.unit.more_is_better() { "at least" } else { "at most" };
        let verdict = |goal: &Goal| {
            let (found, wanted, words) = match *goal {
                Goal::Value(wanted) => (self.ours(), wanted, self.unit.show(Some(wanted))),
                Goal::Ratio(wanted) => (self.ratio(), wanted, format!("a ratio of {wanted:.2}")),
            };
            let met = found.map(|found| if self.unit.more_is_better() { found >= wanted } else { found <= wanted });
            let verdict = met.map_or("not known", |met| if met { "met" } else { "missed" });
            format!("{side} {words}: {verdict}")
        };
        self.goals.iter().map(verdict).collect()
    }

    /// Our median.
    #[must_use]
    pub fn ours(&self) -> Option<f64> {
        median(self.pairs.iter().map(|pair| pair.ours).collect())
    }

    /// The peer's median.
    #[must_use]
    pub fn peer(&self) -> Option<f64> {
        median(self.pairs.iter().filter_map(|pair| pair.peer).collect())
    }

    /// The median of the pairs' ratios, ours to the peer's.
    #[must_use]
    pub fn ratio(&self) -> Option<f64> {
        median(self.ratios())
    }

    /// The pair that is worst for us.
    #[must_use]
    pub fn worst(&self) -> Option<f64> {
        let ratios = self.ratios().into_iter();
        if self.unit.more_is_better() { ratios.min_by(f64::total_cmp) } else { ratios.max_by(f64::total_cmp) }
    }

    fn ratios(&self) -> Vec<f64> {
        self.pairs.iter().filter_map(Pair::ratio).collect()
    }

    fn json(&self) -> Value {
        let pairs: Vec<Value> =
            self.pairs.iter().map(|it| json!({"ours": it.ours, "peer": it.peer, "ratio": it.ratio()})).collect();
        json!({
            "what": self.what, "unit": self.unit.word(), "more_is_better": self.unit.more_is_better(),
            "ours": self.ours(), "peer": self.peer(), "ratio": self.ratio(), "worst_ratio": self.worst(),
            "limit": self.limit.map(|(value, what)| json!({"value": value, "what": what})), "pairs": pairs,
            "goals": self.verdicts(),
        })
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ratio = |ratio: Option<f64>| ratio.map_or("-".to_owned(), |ratio| format!("{ratio:.2}"));
        let limit = self.unit.show(self.limit.map(|(value, _)| value));
        let (ours, peer) = (self.unit.show(self.ours()), self.unit.show(self.peer()));
        write!(f, "ours={ours} peer={peer} ratio={} limit={limit}", ratio(self.ratio()))
    }
}

/// Times of one side, all rounds together.
#[derive(Clone, Debug)]
pub struct Times {
    /// Whose, and of what.
    pub what: String,
    histogram: Histogram<u64>,
}

impl Times {
    /// None yet. Microseconds to three digits.
    pub fn new(what: impl Into<String>) -> Self {
        let longest = u64::try_from(LONGEST.as_micros()).expect("minutes are few microseconds");
        let histogram = Histogram::new_with_bounds(1, longest, 3).expect("the bounds are in order");
        Self { what: what.into(), histogram }
    }

    /// Of these.
    pub fn of(what: impl Into<String>, times: &[Duration]) -> Self {
        let mut all = Self::new(what);
        times.iter().for_each(|time| all.add(*time));
        all
    }

    /// One more.
    pub fn add(&mut self, time: Duration) {
        self.histogram.saturating_record(u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
    }

    /// Takes in another's.
    pub fn merge(&mut self, other: &Self) {
        self.histogram.add(&other.histogram).expect("all have the same bounds");
    }

    /// How many.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.histogram.len()
    }

    /// The time in milliseconds that so many of a hundred do not exceed.
    #[must_use]
    #[allow(clippy::cast_precision_loss)] // Minutes in microseconds are far below 2^52.
    pub fn ms(&self, percentile: f64) -> f64 {
        self.histogram.value_at_percentile(percentile) as f64 / 1000.0
    }

    fn json(&self) -> Value {
        let table: Vec<Value> = PERCENTILES.map(|it| json!({"percentile": it, "ms": self.ms(it)})).to_vec();
        json!({"what": self.what, "count": self.count(), "percentiles": table})
    }
}

impl fmt::Display for Times {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [p50, p90, p99, worst] = [50.0, 90.0, 99.0, 100.0].map(|it| Unit::Ms.show(Some(self.ms(it))));
        write!(f, "{}: n {}, p50 {p50}, p90 {p90}, p99 {p99}, worst {worst}", self.what, self.count())
    }
}

/// All that a name came to.
#[derive(Clone, Debug)]
pub struct Figure {
    /// Its name on the command line.
    pub name: &'static str,
    /// Who was driven beside us and how, or why nobody was.
    pub peer: String,
    /// What was measured; the first is what the name stands for.
    pub rows: Vec<Row>,
    /// Times behind the rows.
    pub times: Vec<Times>,
    /// What was found to have held; without it there is no figure.
    pub history: String,
    /// What else a reader should know.
    pub notes: Vec<String>,
}

impl Figure {
    /// Prints all of it; the last line is `NAME ours=N peer=N ratio=N.NN limit=N`.
    #[allow(clippy::print_stdout)] // A measurement is there to be printed.
    pub fn print(&self, machine: &Machine) {
        println!("{}: peer: {}", self.name, self.peer);
        if let Some(busy) = machine.busy() {
            println!("{}: {busy}", self.name);
        }
        self.times.iter().for_each(|times| println!("  {times}"));
        self.notes.iter().for_each(|note| println!("  {note}"));
        println!("  history: {}", self.history);
        for row in &self.rows {
            if let Some((value, what)) = row.limit {
                println!("  limit of {}: {} ({what})", row.what, row.unit.show(Some(value)));
            }
            if let (Some(median), Some(worst)) = (row.ratio(), row.worst()) {
                let count = row.ratios().len();
                println!("  {}: {count} pairs, ratio median {median:.2}, worst {worst:.2}", row.what);
            }
        }
        self.rows.iter().skip(1).for_each(|row| println!("  {} {row}", row.what));
        for row in &self.rows {
            row.verdicts().iter().for_each(|verdict| println!("  goal of {}: {verdict}", row.what));
        }
        if let Some(row) = self.rows.first() {
            println!("{} {row}", self.name);
        }
    }

    /// All of it, for programs.
    #[must_use]
    pub fn json(&self) -> Value {
        json!({
            "name": self.name, "peer": self.peer, "history": self.history, "notes": self.notes,
            "rows": self.rows.iter().map(Row::json).collect::<Vec<_>>(),
            "times": self.times.iter().map(Times::json).collect::<Vec<_>>(),
        })
    }
}

/// The middle one; of an even number the better half's last would flatter, so the mean of both.
#[must_use]
pub fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match (values.len() % 2, values.get(middle)) {
        (0, Some(upper)) => Some(f64::midpoint(values[middle - 1], *upper)),
        (_, found) => found.copied(),
    }
}

/// Milliseconds.
#[must_use]
pub fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// How many a second.
#[must_use]
#[allow(clippy::cast_precision_loss)] // Counts of what fits into a run.
pub fn per_second(count: u64, elapsed: Duration) -> f64 {
    count as f64 / elapsed.as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(unit: Unit) -> Row {
        let pairs = [(10.0, Some(5.0)), (9.0, Some(6.0)), (8.0, None), (30.0, Some(10.0))];
        Row::new("it", unit, pairs.map(|(ours, peer)| Pair { ours, peer }).to_vec())
    }

    #[test]
    fn ratios_are_of_pairs_and_the_worst_is_the_worst_for_us() {
        let rate = row(Unit::PerSecond).limit(100.0, "the machine");
        assert_eq!((rate.ratio(), rate.worst()), (Some(2.0), Some(1.5)));
        assert_eq!(rate.to_string(), "ours=9.500/s peer=6.000/s ratio=2.00 limit=100.0/s");
        assert_eq!(row(Unit::Ms).worst(), Some(3.0));
        let alone = Row::new("it", Unit::Ms, vec![Pair { ours: 1234.5, peer: None }]);
        assert_eq!(alone.to_string(), "ours=1234ms peer=- ratio=- limit=-");
        assert_eq!(Row::new("it", Unit::Ms, Vec::new()).to_string(), "ours=- peer=- ratio=- limit=-");
    }

    #[test]
    fn goals_are_met_from_the_side_that_is_better() {
        let words = |row: Row| row.verdicts().join(", ");
        let both = |unit, value, ratio| words(row(unit).goal(Goal::Value(value)).goal(Goal::Ratio(ratio)));
        assert_eq!(both(Unit::PerSecond, 9.5, 2.1), "at least 9.500/s: met, at least a ratio of 2.10: missed");
        assert_eq!(both(Unit::Ms, 9.4, 2.0), "at most 9.400ms: missed, at most a ratio of 2.00: met");
        let alone = Row::new("it", Unit::Ms, vec![Pair { ours: 1.0, peer: None }]);
        assert_eq!(words(alone.goal(Goal::Ratio(0.5))), "at most a ratio of 0.50: not known");
        assert_eq!(words(row(Unit::Ms)), "");
    }

    #[test]
    fn times_keep_what_they_were_given() {
        let mut times = Times::of("it", &[1, 2, 3].map(Duration::from_millis));
        times.merge(&Times::of("more", &[Duration::from_secs(7200)]));
        assert_eq!(times.count(), 4);
        assert!((times.ms(50.0) - 2.0).abs() < 0.01, "{times}");
        assert!(times.ms(100.0) > 599_000.0, "what is too long counts as the longest: {times}");
    }
}
