//! All integration tests, in one binary.

#![allow(clippy::unwrap_used, missing_docs)]

mod advantage;
mod boolq;
mod check;
mod config;
mod evaluation;
mod learner;
mod model;
mod objective;
mod objective_identities;
mod parsing;
mod head;
mod ops;
mod sampler;
mod random;
mod scoring;
mod source;
mod tokenizer;
