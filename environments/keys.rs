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
use toml_datetime::de::{DatetimeDeserializer, is_datetime};

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

    /// A key that is not known, and what to say of that.
    pub fn unknown(key: &str, text: impl fmt::Display) -> KeyError {
        KeyError { key: name(key), text: format!("unknown key; {text}"), unknown: true }
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

/// One name of a key's path: as it is where TOML needs no quotes around it, else quoted; cut where nobody would read
/// on.
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
    // Jaro and Winkler miss one slip in a short name, such as two letters that changed places.
    let slip = |name: &str| unknown.chars().nth(2).is_some() && strsim::osa_distance(unknown, name) == 1;
    let similarity = |name| if slip(name) { 1.0 } else { strsim::jaro_winkler(unknown, name) };
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
        let expected = plain(expected);
        let found = match found {
            // One item where a list of them belongs.
            Unexpected::Str(text) if expected == "a list" => {
                let text = cut(text);
                return KeyError::custom(format!("{text:?} is not a list; write [{text:?}]"));
            }
            Unexpected::Str(text) => format!("{:?}", cut(text)),
            Unexpected::Bool(value) => value.to_string(),
            Unexpected::Signed(value) => value.to_string(),
            Unexpected::Unsigned(value) => value.to_string(),
            Unexpected::Float(value) => format!("{value:?}"),
            Unexpected::Seq => "a list".into(),
            Unexpected::Map => "a table".into(),
            other => other.to_string(),
        };
        KeyError::custom(format!("{found} is not {expected}"))
    }

    fn invalid_value(found: Unexpected, expected: &dyn Expected) -> KeyError {
        KeyError::invalid_type(found, expected)
    }

    fn invalid_length(length: usize, expected: &dyn Expected) -> KeyError {
        KeyError::custom(format!("{length} items are not {}", plain(expected)))
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> KeyError {
        let meant = nearest(variant, expected.iter().copied());
        let meant = meant.map(|meant| format!("did you mean {meant:?}? ")).unwrap_or_default();
        KeyError::custom(format!("{:?} is unknown; {meant}known: {}", cut(variant), expected.join(", ")))
    }

    fn unknown_field(field: &str, expected: &'static [&'static str]) -> KeyError {
        let text = match nearest(field, expected.iter().copied()) {
            Some(meant) => format!("did you mean `{meant}`?"),
            None if expected.is_empty() => "none are known here".into(),
            None => format!("known: {}", expected.join(", ")),
        };
        KeyError::unknown(field, text)
    }

    fn missing_field(field: &'static str) -> KeyError {
        KeyError::new(field, "is missing and has no default; add it")
    }
}

/// What serde says that it expects, in words that need no knowledge of Rust.
fn plain(expected: &dyn Expected) -> String {
    let expected = expected.to_string();
    match expected.as_str() {
        "u64" | "u32" | "u16" | "u8" | "usize" => "a whole number from 0 up".into(),
        "i64" | "i32" | "i16" | "i8" | "isize" => "a whole number".into(),
        "f64" | "f32" => "a number".into(),
        "a map" => "a table".into(),
        "a sequence" => "a list".into(),
        "variant identifier" => "a string".into(),
        table if table.starts_with("struct ") || table.contains("tagged enum ") => "a table".into(),
        other => {
            let lists = other.replace("an array", "a list").replace("a tuple of size", "a list of length");
            lists.replace("a boolean", "true or false")
        }
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
            // Serde has no dates: toml's own types read them as a table, and to all others they must not look like one.
            Value::Datetime(date) => visitor.visit_map(DatetimeDeserializer::new(date)).map_err(|error: KeyError| {
                let text = error.text.strip_prefix("a table is not ").map(|expected| format!("is not {expected}"));
                KeyError::custom(format!("the date {date} {}", text.as_deref().unwrap_or("cannot stand here")))
            }),
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

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, KeyError> {
        if is_datetime(name) { self.deserialize_any(visitor) } else { self.deserialize_map(visitor) }
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, KeyError> {
        match &self.0 {
            Value::Datetime(date) => Err(KeyError::custom(format!("the date {date} is not a table"))),
            _ => self.deserialize_any(visitor),
        }
    }

    /// What an enum's variant that is a word alone asks for where a table gave it a value.
    fn deserialize_unit<V: Visitor<'de>>(self, _: V) -> Result<V::Value, KeyError> {
        Err(KeyError::custom("takes no value; write this name in quotes, without a table around it"))
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, KeyError> {
        let found = match self.0 {
            Value::String(variant) => return visitor.visit_enum(variant.into_deserializer()),
            Value::Table(table) if table.len() == 1 => {
                let entries = Entries { rest: table.into_iter(), value: None };
                return visitor.visit_enum(MapAccessDeserializer::new(entries));
            }
            Value::Table(_) => "this table".into(),
            Value::Array(_) => "a list".into(),
            other => other.to_string(),
        };
        let known: Vec<String> = variants.iter().map(|variant| format!("{variant:?}")).collect();
        Err(KeyError::custom(format!("{found} is not one of {}", known.join(", "))))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit_struct seq tuple
        tuple_struct identifier ignored_any
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
