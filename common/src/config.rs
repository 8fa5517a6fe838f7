//! Configuration: flag over environment over file over default, with every mistake named.
//!
//! The structure that is filled (`serde`'s derive) is also the list of known keys: [`schema`] asks it. An unknown key
//! is an error that names the nearest known one. A variable of the environment is `PREFIX_` and the key in upper
//! case, dots as `_`: `exec.shell` is `HELIX_EXEC_SHELL`. Variables that match no key are not ours and are left alone, unless they are
//! one slip away from one.

pub mod schema;
pub mod values;

use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use toml::{Table, Value};

use self::schema::{Kind, Schema};

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not TOML.
    #[error("{path} is not TOML: {why}")]
    Syntax {
        /// Which.
        path: PathBuf,
        /// Where and why.
        why: String,
    },
    /// There is no such key.
    #[error("unknown key `{key}` in {origin}{hint}")]
    UnknownKey {
        /// The key, with the tables it stands in.
        key: String,
        /// Where it was found.
        origin: String,
        /// `; did you mean ...`, or the known keys.
        hint: String,
    },
    /// A value does not fit its key.
    #[error("`{key}` in {origin}: {why}")]
    Value {
        /// The key.
        key: String,
        /// Where it was found.
        origin: String,
        /// What is wrong.
        why: String,
    },
    /// The whole does not fit: a required key is missing, or a value is out of range.
    #[error("{origin}: {why}")]
    Whole {
        /// The file, or the sources taken together.
        origin: String,
        /// What is wrong.
        why: String,
    },
}

/// Loads a configuration from a file (if given), the environment and the flags.
///
/// # Errors
/// [`ConfigError`], which names key and origin.
pub fn load<T: DeserializeOwned>(path: Option<&Path>, env_prefix: &str, overrides: Table) -> Result<T, ConfigError> {
    let env =
        std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    load_from(path, env_prefix, env, overrides)
}

/// [`load`] with the environment given: what tests use.
///
/// # Errors
/// As [`load`].
pub fn load_from<T: DeserializeOwned>(
    path: Option<&Path>,
    env_prefix: &str,
    env: impl IntoIterator<Item = (String, String)>,
    overrides: Table,
) -> Result<T, ConfigError> {
    let schema = schema::of::<T>();
    let mut merged = match path {
        Some(path) => read_file(path, &schema)?,
        None => Table::new(),
    };
    merge(&mut merged, from_environment(&schema, env_prefix, env)?);
    check_keys(&schema, &overrides, "the command line")?;
    merge(&mut merged, overrides);
    let origin = path.map_or_else(|| "configuration".to_owned(), |path| path.display().to_string());
    T::deserialize(Value::Table(merged))
        .map_err(|error| ConfigError::Whole { origin, why: error.to_string().trim().replace('\n', "; ") })
}

/// Sets `key` (dotted) from text in a table of overrides, as the type of the key in `T` asks: for `--set KEY=VALUE`.
///
/// # Errors
/// When the key is unknown or the text does not fit it.
pub fn set<T: DeserializeOwned>(overrides: &mut Table, key: &str, text: &str) -> Result<(), ConfigError> {
    let schema = schema::of::<T>();
    let path: Vec<&str> = key.split('.').collect();
    let origin = "the command line";
    let kind = schema.kind(&path).ok_or_else(|| unknown(&schema, &path, origin))?;
    let value =
        kind.value(text).map_err(|why| ConfigError::Value { key: key.to_owned(), origin: origin.to_owned(), why })?;
    insert(overrides, &path, value);
    Ok(())
}

/// The effective values as TOML, for `config check`. Configurations hold paths of secrets, never secrets.
///
/// # Errors
/// When the structure has no TOML form.
pub fn effective<T: Serialize>(config: &T) -> Result<String, toml::ser::Error> {
    toml::to_string_pretty(config)
}

fn read_file(path: &Path, schema: &Schema) -> Result<Table, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    let table: Table = toml::from_str(&text)
        .map_err(|error| ConfigError::Syntax { path: path.to_owned(), why: error.to_string().trim().to_owned() })?;
    check_keys(schema, &table, &path.display().to_string())?;
    Ok(table)
}

fn from_environment(
    schema: &Schema,
    prefix: &str,
    env: impl IntoIterator<Item = (String, String)>,
) -> Result<Table, ConfigError> {
    let leaves = schema.leaves();
    let variable = |path: &[String]| format!("{prefix}_{}", path.join("_").to_uppercase().replace('-', "_"));
    let mut table = Table::new();
    for (name, text) in env {
        if !name.starts_with(prefix) {
            continue;
        }
        if let Some((path, kind)) = leaves.iter().find(|(path, _)| variable(path) == name) {
            let value = kind.value(&text).map_err(|why| ConfigError::Value {
                key: path.join("."),
                origin: format!("the environment ({name})"),
                why,
            })?;
            let path: Vec<&str> = path.iter().map(String::as_str).collect();
            insert(&mut table, &path, value);
        } else if let Some((path, _)) = leaves.iter().find(|(path, _)| is_slip(&variable(path), &name)) {
            return Err(ConfigError::UnknownKey {
                key: name,
                origin: "the environment".to_owned(),
                hint: format!("; did you mean `{}`?", variable(path)),
            });
        }
    }
    Ok(table)
}

/// Whether a variable is surely meant for another: the same but for its underscores.
fn is_slip(known: &str, found: &str) -> bool {
    known.replace('_', "") == found.replace('_', "")
}

fn check_keys(schema: &Schema, table: &Table, origin: &str) -> Result<(), ConfigError> {
    fn walk(
        root: &Schema,
        schema: &Schema,
        value: &Table,
        path: &mut Vec<String>,
        origin: &str,
    ) -> Result<(), ConfigError> {
        let Some(fields) = schema.fields() else { return Ok(()) };
        for (key, value) in value {
            path.push(key.clone());
            let Some(inner) = fields.get(key.as_str()) else {
                let path: Vec<&str> = path.iter().map(String::as_str).collect();
                return Err(unknown(root, &path, origin));
            };
            if let Value::Table(table) = value {
                walk(root, inner, table, path, origin)?;
            }
            path.pop();
        }
        Ok(())
    }
    walk(schema, schema, table, &mut Vec::new(), origin)
}

fn unknown(schema: &Schema, path: &[&str], origin: &str) -> ConfigError {
    let key = path.join(".");
    let known: Vec<String> = schema.leaves().iter().map(|(path, _)| path.join(".")).collect();
    let last = path.last().copied().unwrap_or_default();
    // A key may be misspelt, or stand in the wrong table.
    let found = known
        .iter()
        .map(|candidate| {
            let name = candidate.rsplit('.').next().unwrap_or_default();
            (distance(candidate, &key).min(distance(name, last)), candidate)
        })
        .min_by_key(|(far, candidate)| (*far, candidate.len()));
    let hint = match found {
        Some((far, candidate)) if far <= slips_max(last) => format!("; did you mean `{candidate}`?"),
        _ => format!("; known: {}", known.join(", ")),
    };
    ConfigError::UnknownKey { key, origin: origin.to_owned(), hint }
}

fn insert(table: &mut Table, path: &[&str], value: Value) {
    match path {
        [] => {}
        [last] => {
            table.insert((*last).to_owned(), value);
        }
        [first, rest @ ..] => {
            let inner = table.entry((*first).to_owned()).or_insert_with(|| Value::Table(Table::new()));
            if !inner.is_table() {
                *inner = Value::Table(Table::new());
            }
            if let Value::Table(inner) = inner {
                insert(inner, rest, value);
            }
        }
    }
}

/// Tables merge key by key; everything else is replaced whole.
fn merge(below: &mut Table, above: Table) {
    for (key, value) in above {
        match (below.get_mut(&key), value) {
            (Some(Value::Table(below)), Value::Table(above)) => merge(below, above),
            (_, value) => {
                below.insert(key, value);
            }
        }
    }
}

/// The known name that a misspelt one most likely stands for.
pub fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let found = known.into_iter().map(|candidate| (distance(candidate, name), candidate)).min_by_key(|(far, _)| *far);
    found.filter(|(far, _)| *far <= slips_max(name)).map(|(_, candidate)| candidate)
}

fn slips_max(name: &str) -> usize {
    (name.len() / 3).max(1)
}

/// Single-character edits between two words.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, left) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, right) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(left != *right);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

impl Kind {
    /// Reads text as a value of this kind; lists may be given as `a,b` or as TOML.
    fn value(self, text: &str) -> Result<Value, String> {
        let toml = |text: &str| toml::from_str::<Table>(&format!("v = {text}")).ok().and_then(|mut t| t.remove("v"));
        match self {
            Self::Text => Ok(Value::String(text.to_owned())),
            Self::Bool => text.parse().map(Value::Boolean).map_err(|_| format!("{text:?} is neither true nor false")),
            Self::Integer => text.parse().map(Value::Integer).map_err(|_| format!("{text:?} is not a whole number")),
            Self::Float => text.parse().map(Value::Float).map_err(|_| format!("{text:?} is not a number")),
            Self::List if text.trim_start().starts_with('[') => {
                toml(text).ok_or_else(|| format!("{text:?} is not a TOML list"))
            }
            Self::List => {
                let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
                Ok(Value::Array(items.map(|item| Value::String(item.to_owned())).collect()))
            }
            Self::Map => toml(text)
                .filter(Value::is_table)
                .ok_or_else(|| format!("{text:?} is not a TOML inline table such as {{ key = \"value\" }}")),
            Self::Any => Ok(toml(text).unwrap_or_else(|| Value::String(text.to_owned()))),
        }
    }
}

#[cfg(test)]
mod tests;
