//! The keys of a configuration structure, asked from its own `Deserialize`.
//!
//! serde's derive tells a deserializer which fields it wants. [`of`] plays the deserializer: it offers one field at a
//! time and notes what each asks for. Nothing is ever built; every try ends in an error that carries nothing.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{self, DeserializeOwned, DeserializeSeed, Deserializer, MapAccess, Visitor};
use serde::forward_to_deserialize_any;

/// Tables in tables, at most: structures that contain themselves would have no end.
const DEPTH_MAX: usize = 8;

/// What a key takes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Text, also what is written as text: durations, sizes, addresses, words.
    Text,
    /// `true` or `false`.
    Bool,
    /// A whole number.
    Integer,
    /// A number.
    Float,
    /// A list.
    List,
    /// A table with keys of the user's.
    Map,
    /// Unknown.
    Any,
}

/// A structure's keys, or what a single value takes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Schema {
    /// A value.
    Value(Kind),
    /// A table with known keys.
    Table(BTreeMap<&'static str, Schema>),
}

impl Schema {
    /// The known keys, for a table that has them.
    #[must_use]
    pub fn fields(&self) -> Option<&BTreeMap<&'static str, Self>> {
        match self {
            Self::Table(fields) => Some(fields),
            Self::Value(_) => None,
        }
    }

    /// What the value at a path takes.
    #[must_use]
    pub fn kind(&self, path: &[&str]) -> Option<Kind> {
        match (self, path) {
            (Self::Value(kind), []) => Some(*kind),
            // A key below a free table is the user's.
            (Self::Value(Kind::Map), [_]) => Some(Kind::Any),
            (Self::Table(fields), [first, rest @ ..]) => fields.get(first)?.kind(rest),
            _ => None,
        }
    }

    /// The paths of all values.
    #[must_use]
    pub fn leaves(&self) -> Vec<(Vec<String>, Kind)> {
        match self {
            Self::Value(kind) => vec![(Vec::new(), *kind)],
            Self::Table(fields) => fields
                .iter()
                .flat_map(|(name, inner)| {
                    inner.leaves().into_iter().map(|(mut path, kind)| {
                        path.insert(0, (*name).to_owned());
                        (path, kind)
                    })
                })
                .collect(),
        }
    }
}

/// The schema of a structure.
#[must_use]
pub fn of<T: DeserializeOwned>() -> Schema {
    at::<T>(&mut Vec::new())
}

fn at<T: DeserializeOwned>(path: &mut Vec<&'static str>) -> Schema {
    let mut found = Found::Value(Kind::Any);
    // Always an error: nothing real is offered.
    let _ = T::deserialize(Probe { path, found: &mut found });
    match found {
        Found::Value(kind) => Schema::Value(kind),
        Found::Fields(_) if path.len() >= DEPTH_MAX => Schema::Value(Kind::Any),
        Found::Fields(fields) => Schema::Table(
            fields
                .iter()
                .map(|field| {
                    path.push(field);
                    let inner = at::<T>(path);
                    path.pop();
                    (*field, inner)
                })
                .collect(),
        ),
    }
}

enum Found {
    Value(Kind),
    Fields(&'static [&'static str]),
}

/// Walks down `path` through whatever structures are asked for, and notes what is asked for at its end.
struct Probe<'a> {
    path: &'a [&'static str],
    found: &'a mut Found,
}

#[derive(Debug)]
struct Stop;

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("only the shape was asked for")
    }
}

impl std::error::Error for Stop {}

impl de::Error for Stop {
    fn custom<T: fmt::Display>(_: T) -> Self {
        Self
    }
}

impl Probe<'_> {
    fn note<T>(self, kind: Kind) -> Result<T, Stop> {
        *self.found = Found::Value(kind);
        Err(Stop)
    }
}

macro_rules! note {
    ($($method:ident => $kind:ident,)*) => {
        $(fn $method<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Stop> {
            self.note(Kind::$kind)
        })*
    };
}

impl<'de> Deserializer<'de> for Probe<'_> {
    type Error = Stop;

    note! {
        deserialize_any => Any,
        deserialize_bool => Bool,
        deserialize_i8 => Integer, deserialize_i16 => Integer, deserialize_i32 => Integer, deserialize_i64 => Integer,
        deserialize_u8 => Integer, deserialize_u16 => Integer, deserialize_u32 => Integer, deserialize_u64 => Integer,
        deserialize_f32 => Float, deserialize_f64 => Float,
        deserialize_char => Text, deserialize_str => Text, deserialize_string => Text,
        deserialize_identifier => Text,
        deserialize_seq => List,
        deserialize_map => Map,
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Stop> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Stop> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, Stop> {
        self.note(Kind::Text)
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, _: usize, _: V) -> Result<V::Value, Stop> {
        self.note(Kind::List)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Stop> {
        match self.path.split_first() {
            None => {
                *self.found = Found::Fields(fields);
                Err(Stop)
            }
            Some((field, rest)) => visitor.visit_map(OneField { field: Some(field), path: rest, found: self.found }),
        }
    }

    forward_to_deserialize_any! {
        i128 u128 bytes byte_buf unit unit_struct tuple_struct ignored_any
    }
}

struct OneField<'a> {
    field: Option<&'static str>,
    path: &'a [&'static str],
    found: &'a mut Found,
}

impl<'de> MapAccess<'de> for OneField<'_> {
    type Error = Stop;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Stop> {
        match self.field.take() {
            Some(field) => seed.deserialize(de::value::StrDeserializer::new(field)).map(Some),
            None => Ok(None),
        }
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Stop> {
        seed.deserialize(Probe { path: self.path, found: self.found })
    }
}
