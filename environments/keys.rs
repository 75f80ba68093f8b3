//! Tables of a config as typed options, with errors that name the key and, where a name is not known, the nearest one
//! that is. The engine's own sections are read by the same function.

use std::fmt;
use std::iter::Enumerate;

use serde::de::value::MapAccessDeserializer;
use serde::de::{
    DeserializeOwned, DeserializeSeed, Deserializer, Error, Expected, IntoDeserializer, MapAccess, SeqAccess,
    Unexpected, Visitor,
};
use serde::forward_to_deserialize_any;
use toml::Value;
use toml_datetime::de::DatetimeDeserializer;

/// A key of a table that cannot be what it is, or is not there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyError {
    /// The key by its path in the table, such as `length.weight` or `targets.0`; empty where the table itself is meant.
    pub key: String,
    /// What is wrong and what to do about it.
    pub text: String,
    /// Whether nothing by this name is known here.
    pub unknown: bool,
}

impl KeyError {
    /// A value that cannot work.
    pub fn new(key: impl Into<String>, text: impl Into<String>) -> KeyError {
        KeyError { key: key.into(), text: text.into(), unknown: false }
    }

    /// The same error as seen from the table around: its key is below `outer`.
    pub fn within(self, outer: &str) -> KeyError {
        KeyError { key: join(outer, &self.key), ..self }
    }
}

impl fmt::Display for KeyError {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        let KeyError { key, text, .. } = self;
        if key.is_empty() { formatter.write_str(text) } else { write!(formatter, "{key}: {text}") }
    }
}

impl std::error::Error for KeyError {}

/// Reads a table as a type. Derive `deny_unknown_fields` on it, or misspelled keys pass in silence.
///
/// # Errors
/// The first key that is unknown, missing, or holds what its type does not.
pub fn typed<T: DeserializeOwned>(table: impl Into<Value>) -> Result<T, KeyError> {
    T::deserialize(Typed(table.into()))
}

/// One name of a key's path: as it is where TOML needs no quotes around it, else quoted; cut where nobody would read on.
pub fn name(key: &str) -> String {
    let bare = |character: char| character.is_ascii_alphanumeric() || "_-".contains(character);
    if !key.is_empty() && key.chars().all(bare) { cut(key) } else { format!("{:?}", cut(key)) }
}

/// Two stretches of a key's path as one; either may be empty.
pub fn join(outer: &str, inner: &str) -> String {
    let dot = if outer.is_empty() || inner.is_empty() { "" } else { "." };
    format!("{outer}{dot}{inner}")
}

/// The known name that somebody who wrote `unknown` most likely meant.
pub fn nearest<'a>(unknown: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let similarity = |name| strsim::jaro_winkler(unknown, name);
    let best = known.into_iter().max_by(|a, b| similarity(a).total_cmp(&similarity(b)));
    // Lower and names that merely share their first letters would be offered.
    best.filter(|name| similarity(name) > 0.8)
}

/// A text as an error quotes it: the first 80 characters.
pub fn cut(text: &str) -> String {
    const LONGEST: usize = 80;
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.into(),
    }
}

impl Error for KeyError {
    fn custom<T: fmt::Display>(text: T) -> KeyError {
        KeyError::new("", text.to_string())
    }

    fn invalid_type(found: Unexpected, expected: &dyn Expected) -> KeyError {
        let found = match found {
            Unexpected::Str(text) => format!("{:?}", cut(text)),
            Unexpected::Bool(value) => value.to_string(),
            Unexpected::Signed(value) => value.to_string(),
            Unexpected::Unsigned(value) => value.to_string(),
            Unexpected::Float(value) => format!("{value:?}"),
            Unexpected::Seq => "a list".into(),
            Unexpected::Map => "a table".into(),
            other => other.to_string(),
        };
        let expected = match expected.to_string() {
            whole if ["u64", "u32", "usize"].contains(&whole.as_str()) => "a whole number from 0 up".into(),
            number if ["f64", "f32"].contains(&number.as_str()) => "a number".into(),
            table if table.starts_with("struct ") || table == "a map" => "a table".into(),
            list if list == "a sequence" => "a list".into(),
            other => other.replace("an array", "a list").replace("a boolean", "true or false"),
        };
        KeyError::custom(format!("{found} is not {expected}"))
    }

    fn invalid_value(found: Unexpected, expected: &dyn Expected) -> KeyError {
        KeyError::invalid_type(found, expected)
    }

    fn invalid_length(length: usize, expected: &dyn Expected) -> KeyError {
        KeyError::custom(format!("{length} items are not {}", expected.to_string().replace("an array", "a list")))
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> KeyError {
        let meant = nearest(variant, expected.iter().copied());
        let meant = meant.map(|meant| format!("did you mean {meant:?}? ")).unwrap_or_default();
        KeyError::custom(format!("{:?} is unknown; {meant}known: {}", cut(variant), expected.join(", ")))
    }

    fn unknown_field(field: &str, expected: &'static [&'static str]) -> KeyError {
        let text = match nearest(field, expected.iter().copied()) {
            Some(meant) => format!("unknown key; did you mean `{meant}`?"),
            None if expected.is_empty() => "unknown key; none are known here".into(),
            None => format!("unknown key; known: {}", expected.join(", ")),
        };
        KeyError { key: name(field), text, unknown: true }
    }

    fn missing_field(field: &'static str) -> KeyError {
        KeyError::new(field, "is missing and has no default; add it")
    }
}

/// A value; errors get the path to it from the table or list around.
struct Typed(Value);

impl<'de> Deserializer<'de> for Typed {
    type Error = KeyError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, KeyError> {
        match self.0 {
            Value::String(text) => visitor.visit_string(text),
            Value::Integer(number) => visitor.visit_i64(number),
            Value::Float(number) => visitor.visit_f64(number),
            Value::Boolean(value) => visitor.visit_bool(value),
            Value::Datetime(date) => visitor.visit_map(DatetimeDeserializer::new(date)),
            Value::Table(table) => visitor.visit_map(Entries { rest: table.into_iter(), value: None }),
            Value::Array(items) => {
                let length = items.len();
                let mut items = Items(items.into_iter().enumerate());
                let read = visitor.visit_seq(&mut items)?;
                let left = items.0.len();
                if left == 0 {
                    Ok(read)
                } else {
                    Err(KeyError::custom(format!("{length} items are not a list of length {}", length - left)))
                }
            }
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, KeyError> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, KeyError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, KeyError> {
        match self.0 {
            Value::String(variant) => visitor.visit_enum(variant.into_deserializer()),
            Value::Table(table) => {
                let entries = Entries { rest: table.into_iter(), value: None };
                visitor.visit_enum(MapAccessDeserializer::new(entries))
            }
            value => Typed(value).deserialize_any(visitor),
        }
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple
        tuple_struct map struct identifier ignored_any
    }
}

/// The entries of a table that are still to be read, and the value whose key has been.
struct Entries {
    rest: toml::map::IntoIter<String, Value>,
    value: Option<(String, Value)>,
}

impl<'de> MapAccess<'de> for Entries {
    type Error = KeyError;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, KeyError> {
        self.value = self.rest.next();
        self.value.as_ref().map(|(key, _)| seed.deserialize(key.as_str().into_deserializer())).transpose()
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, KeyError> {
        let (key, value) = self.value.take().ok_or_else(|| KeyError::custom("a value was asked for before its key"))?;
        seed.deserialize(Typed(value)).map_err(|error| error.within(&name(&key)))
    }
}

/// The items of a list that are still to be read.
struct Items(Enumerate<std::vec::IntoIter<Value>>);

impl<'de> SeqAccess<'de> for Items {
    type Error = KeyError;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, KeyError> {
        let read = |(index, value): (usize, _)| {
            seed.deserialize(Typed(value)).map_err(|error| error.within(&index.to_string()))
        };
        self.0.next().map(read).transpose()
    }
}
