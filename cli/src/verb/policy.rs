//! `helix cluster policy get|set`.

use std::collections::BTreeMap;
use std::fmt::Write;

use clap::{Args, Subcommand};
use helix_model::{Measure, parse};
use helix_proto::v1;
use serde_json::{Map, Value, json};

use crate::connection::{Connection, cluster};
use crate::context::ContextOptions;
use crate::exit::Code;
use crate::failure::Failure;
use crate::output::{Format, Item, Output};

/// What a key is set to that is to be as if nobody had set it.
const DEFAULT: &str = "=default";

const HEADER: [&str; 5] = ["key", "value", "default", "allowed", "for"];

/// `helix cluster policy`.
#[derive(Args)]
pub(crate) struct PolicyArguments {
    #[command(subcommand)]
    verb: PolicyVerb,
}

#[derive(Subcommand)]
enum PolicyVerb {
    /// The policy in force
    Get {
        /// Only these keys
        #[arg(value_name = "KEY")]
        keys: Vec<String>,
        /// Answer from what the coordinator at hand knows
        #[arg(long)]
        stale: bool,
    },
    /// Change keys, all of them or none; operators only
    Set {
        /// A value is a number in the key's unit, a duration such as 90s, a size such as 10GiB, or `default`. Lifetimes
        /// have rules, too: retain_ms, retain_logs_ms and retain_artifacts_ms with `[STATE]`, `[K=V]` or `[STATE,K=V]` behind them, such as
        /// `retain_logs_ms[failed]=90d`; of those that fit a build the longest counts, and `default` takes one away
        #[arg(value_name = "KEY=VALUE", required = true)]
        values: Vec<String>,
        /// Change nothing unless this key has this value
        #[arg(long, value_name = "KEY=VALUE")]
        expect: Vec<String>,
    },
}

pub(crate) async fn run(
    arguments: PolicyArguments,
    context: &ContextOptions,
    output: &Output,
) -> Result<Code, Failure> {
    match arguments.verb {
        PolicyVerb::Get { keys, stale } => {
            let call = |channel| async move { cluster(channel).get_policy(v1::GetPolicyRequest { stale }).await };
            let found = Connection::open(context)?.call(call).await?.into_inner().keys;
            show(&chosen(found, &keys)?, output);
        }
        PolicyVerb::Set { values, expect } => {
            let (reset, values): (Vec<_>, Vec<_>) = values.into_iter().partition(|text| text.ends_with(DEFAULT));
            let reset = reset.iter().filter_map(|text| text.strip_suffix(DEFAULT)).map(str::to_owned).collect();
            let request = v1::SetPolicyRequest { values: wishes(&values)?, expected: wishes(&expect)?, reset };
            let call = |channel| {
                let request = request.clone();
                async move { cluster(channel).set_policy(request).await }
            };
            let response = Connection::open(context)?.call(call).await?.into_inner();
            told(&response, &request, output);
        }
    }
    Ok(Code::SUCCESS)
}

/// The keys asked for, in the order asked for; all of them where none is.
fn chosen(found: Vec<v1::PolicyKey>, wanted: &[String]) -> Result<Vec<v1::PolicyKey>, Failure> {
    if wanted.is_empty() {
        return Ok(found);
    }
    let named = |name: &String| {
        let key = found.iter().find(|key| key.name == *name).cloned();
        key.ok_or_else(|| {
            Failure::plain(format!("the policy has no key {name:?}; `helix cluster policy get` lists them"))
        })
    };
    wanted.iter().map(named).collect()
}

fn show(keys: &[v1::PolicyKey], output: &Output) {
    match output.format {
        Format::Table | Format::Quiet => output.items(&HEADER, &keys.iter().map(row).collect::<Vec<_>>()),
        // One object, so that a script asks for `.log_bytes_max`.
        Format::Json | Format::Jsonl => {
            output.item(&Item { name: String::new(), cells: Vec::new(), json: values(keys) }, "");
        }
    }
}

/// Quiet prints what `set` takes.
fn row(key: &v1::PolicyKey) -> Item {
    let people = |value| for_people(&key.name, value);
    Item {
        name: format!("{}={}", key.name, key.value),
        cells: vec![
            key.name.clone(),
            people(key.value),
            if key.value == key.default_value { String::new() } else { people(key.default_value) },
            format!("{} to {}", people(key.min), people(key.max)),
            key.about.clone(),
        ],
        json: json!(key.value),
    }
}

fn values(keys: &[v1::PolicyKey]) -> Value {
    Value::Object(keys.iter().map(|key| (key.name.clone(), json!(key.value))).collect::<Map<_, _>>())
}

/// What was before, and what is now, of the keys that were set.
fn told(response: &v1::SetPolicyResponse, request: &v1::SetPolicyRequest, output: &Output) {
    let before: BTreeMap<&str, u64> = response.before.iter().map(|key| (key.name.as_str(), key.value)).collect();
    let mut text = String::new();
    let mut changed = Map::new();
    let meant = |key: &&v1::PolicyKey| request.values.contains_key(&key.name) || request.reset.contains(&key.name);
    for key in response.after.iter().filter(meant) {
        let was = before.get(key.name.as_str()).copied().unwrap_or(key.default_value);
        let (from, to) = (for_people(&key.name, was), for_people(&key.name, key.value));
        let _ = if was == key.value {
            writeln!(text, "{}: {to}, as before", key.name)
        } else {
            writeln!(text, "{}: {to}, before {from}", key.name)
        };
        changed.insert(key.name.clone(), json!({ "before": was, "after": key.value }));
    }
    for gone in request.reset.iter().filter(|name| !response.after.iter().any(|key| key.name == **name)) {
        let was = before.get(gone.as_str()).copied();
        let _ = match was {
            Some(value) => writeln!(text, "{gone}: gone, before {}", for_people(gone, value)),
            None => writeln!(text, "{gone}: was not there"),
        };
        changed.insert(gone.clone(), json!({ "before": was, "after": null }));
    }
    let names: Vec<String> = response.after.iter().filter(meant).map(|key| row(key).name).collect();
    let json = json!({ "set": changed, "policy": values(&response.after) });
    output.item(&Item { name: names.join("\n"), cells: Vec::new(), json }, &text);
}

/// What a key's name says its numbers are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Unit {
    Ms,
    Bytes,
    Count,
}

impl Unit {
    fn of(name: &str) -> Self {
        // A rule's name is its key's with a selector behind it.
        let name = name.split('[').next().unwrap_or_default();
        if name.ends_with("_ms") {
            Self::Ms
        } else if name.ends_with("_bytes") || name.ends_with("_bytes_max") {
            Self::Bytes
        } else {
            Self::Count
        }
    }
}

fn for_people(name: &str, value: u64) -> String {
    match Unit::of(name) {
        Unit::Ms => parse::duration_text(value),
        Unit::Bytes => Measure::Disk.text(value),
        Unit::Count => value.to_string(),
    }
}

/// `KEY=VALUE`s, none of them twice. A rule's name has `=` of its own, a value has none.
fn wishes(given: &[String]) -> Result<BTreeMap<String, u64>, Failure> {
    let mut all = BTreeMap::new();
    for text in given {
        let (name, value) =
            text.rsplit_once('=').ok_or_else(|| Failure::usage(format!("{text:?} is not of the form KEY=VALUE")))?;
        if all.insert(name.to_owned(), number(name, value)?).is_some() {
            return Err(Failure::usage(format!("{name} is given twice")));
        }
    }
    Ok(all)
}

fn number(name: &str, text: &str) -> Result<u64, Failure> {
    let wrong = |what: &str| Failure::usage(format!("{name}: {text:?} is not {what}"));
    if let Ok(number) = text.parse() {
        return Ok(number);
    }
    match Unit::of(name) {
        Unit::Ms => parse::duration_ms("value", text)
            .map_err(|_| wrong("a number of milliseconds, or a duration such as 250ms, 90s, 1h30m or 7d")),
        Unit::Bytes => parse::size_bytes("value", text)
            .map_err(|_| wrong("a number of bytes, or a size such as 512, 64KiB or 10GiB")),
        Unit::Count => Err(wrong("a number")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_numbers_in_their_unit_or_as_people_write_them() {
        for (name, text, value) in [
            ("worker_lease_ms", "15000", 15_000),
            ("worker_lease_ms", "1m30s", 90_000),
            ("log_bytes_max", "4MiB", 4 << 20),
            ("disk_reserve_bytes", "0", 0),
            ("queue_max", "7", 7),
            ("retain_logs_ms[failed,k=v]", "7d", 7 * 86_400_000),
        ] {
            assert_eq!(number(name, text).unwrap(), value, "{name}={text}");
        }
        for (name, text) in
            [("worker_lease_ms", "4MiB"), ("log_bytes_max", "1h"), ("queue_max", "1k"), ("copies", "-1")]
        {
            let failure = number(name, text).unwrap_err();
            assert!(failure.code == Code::USAGE && failure.message.starts_with(name), "{name}={text}");
        }
    }

    #[test]
    fn a_key_is_given_once() {
        let given = |texts: &[&str]| wishes(&texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>());
        assert_eq!(given(&["copies=2", "queue_max=5"]).unwrap().len(), 2);
        assert_eq!(
            given(&["retain_ms[k=v]=3d"]).unwrap(),
            BTreeMap::from([("retain_ms[k=v]".to_owned(), 259_200_000)])
        );
        assert!(given(&["copies=2", "copies=2"]).unwrap_err().message.contains("twice"));
        assert!(given(&["copies"]).unwrap_err().message.contains("KEY=VALUE"));
    }
}
