//! Calibration maps as files: `{"format": "candor calibration map", "version": 1, "kind": "platt", "a": 1.5, ...}`. Nothing in one is
//! believed before it is checked.

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use candor_environments::{READERS, Reading};
use serde::{Deserialize, Serialize};
use serde_json::{Map as Object, Value};

use crate::evaluation::posthoc::{BINS, EPSILON, Map};
use crate::run::write_whole;

/// What the files say that they are.
const FORMAT: &str = "candor calibration map";

/// The version of the format.
const VERSION: u64 = 1;

/// A larger file is no map.
const LARGEST: u64 = 64 << 20;

/// Where a confidence comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Confidence {
    /// The completion states it.
    Stated,
    /// The probabilities of the answer's tokens do.
    Token,
}

/// A fitted map, and what it was fitted on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CalibrationMap {
    /// The environment whose answers it was fitted on: confidences are read as it reads them.
    pub environment: String,
    /// What is mapped.
    pub of: Confidence,
    /// How many answers it was fitted on.
    pub answers: usize,
    /// What confidences are clipped to before a logarithm is taken.
    pub epsilon: f64,
    /// The map itself.
    #[serde(flatten)]
    pub map: Map,
}

impl CalibrationMap {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// If it is not a map of this version, or one that no fit makes; with the file and the field.
    pub fn read(path: &Path) -> Result<Self> {
        let read = || -> Result<Self> {
            let mut text = String::new();
            File::open(path)
                .and_then(|file| file.take(LARGEST + 1).read_to_string(&mut text))
                .context("cannot read")?;
            ensure!(text.len() as u64 <= LARGEST, "is larger than {LARGEST} bytes, which no calibration map is");
            Self::parse(&text)
        };
        read().with_context(|| path.display().to_string())
    }

    /// The map in a text.
    ///
    /// # Errors
    /// As [`CalibrationMap::read`].
    pub fn parse(text: &str) -> Result<Self> {
        let mut fields: Object<String, Value> = serde_json::from_str(text).context("not a calibration map")?;
        let format = fields.remove("format").unwrap_or_default();
        ensure!(format == FORMAT, "not a calibration map: field `format` is {format} and not {FORMAT:?}");
        let version = fields.remove("version").unwrap_or_default();
        ensure!(version == VERSION, "field `version` is {version}, this program reads {VERSION}; fit the map again");
        let map: Self = serde_json::from_value(Value::Object(fields)).context("not a calibration map")?;
        map.check()?;
        Ok(map)
    }

    /// The confidence in a completion that this map is for; `token` gives that of the probabilities of an answer's bytes. `None`
    /// where there is none.
    ///
    /// # Errors
    /// If it was fitted on an environment whose completions cannot be read without it.
    pub fn confidence(&self, text: &str, token: impl Fn(Range<usize>) -> Option<f64>) -> Result<Option<f64>> {
        let Reading { confidence, answer } = self.reader()?(text);
        Ok(match self.of {
            Confidence::Stated => confidence,
            Confidence::Token => answer.and_then(token),
        })
    }

    /// What reads completions as the map's environment does.
    ///
    /// # Errors
    /// If that is not a built-in one.
    pub fn reader(&self) -> Result<fn(&str) -> Reading> {
        let reader = READERS.iter().find(|(name, _)| *name == self.environment).map(|(_, reader)| *reader);
        reader.with_context(|| {
            let known: Vec<&str> = READERS.iter().map(|(name, _)| *name).collect();
            let (environment, known) = (&self.environment, known.join(", "));
            format!("the map is for completions of {environment:?}; known here: {known}")
        })
    }

    /// Writes it, whole or not at all.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn write(&self, path: &Path) -> Result<()> {
        let mut fields =
            Object::from_iter([("format".to_string(), FORMAT.into()), ("version".to_string(), VERSION.into())]);
        if let Value::Object(rest) = serde_json::to_value(self)? {
            fields.extend(rest);
        }
        write_whole(path, &serde_json::to_vec_pretty(&fields)?)
    }

    fn check(&self) -> Result<()> {
        // Far beyond what a fit gives, and far from where products overflow.
        let finite = |name: &str, value: f64| {
            ensure!(value.abs() <= 1e9, "field `{name}`: {value} is not in -1e9 to 1e9");
            Ok(())
        };
        let probabilities = |name: &str, values: &[f64]| {
            let odd = values.iter().position(|value| !(0.0..=1.0).contains(value));
            odd.map_or(Ok(()), |index| bail!("field `{name}`: number {index}, {}, is not in [0, 1]", values[index]))
        };
        ensure!(
            self.epsilon == EPSILON,
            "field `epsilon` is {}, this program clips to {EPSILON}; fit the map again",
            self.epsilon
        );
        match &self.map {
            Map::Temperature { temperature } => {
                ensure!(
                    (0.01..=100.0).contains(temperature),
                    "field `temperature`: {temperature} is not in 0.01 to 100"
                );
            }
            Map::Platt { a, b } => {
                [("a", *a), ("b", *b)].into_iter().try_for_each(|(name, value)| finite(name, value))?
            }
            Map::Beta { a, b, m } => {
                [("a", *a), ("b", *b), ("m", *m)].into_iter().try_for_each(|(name, value)| finite(name, value))?;
                ensure!(*a >= 0.0 && *b >= 0.0, "fields `a` and `b`: {a} and {b} must not be below 0");
            }
            Map::Isotonic { x, y, .. } => {
                ensure!(
                    !x.is_empty() && x.len() == y.len(),
                    "fields `x` and `y`: {} and {} numbers, where as many are needed, at least one",
                    x.len(),
                    y.len()
                );
                probabilities("x", x)?;
                probabilities("y", y)?;
                ensure!(x.is_sorted_by(|one, next| one < next), "field `x` does not ascend");
                ensure!(y.is_sorted(), "field `y` falls somewhere");
            }
            Map::Histogram { values } => {
                ensure!(values.len() == BINS, "field `values`: {} numbers and not {BINS}", values.len());
                probabilities("values", values)?;
            }
        }
        Ok(())
    }
}
