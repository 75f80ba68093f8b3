//! All integration tests, in one binary.

#![allow(clippy::unwrap_used, missing_docs)]

mod advantage;
mod binary;
mod boolq;
mod check;
mod config;
mod evaluation;
mod failures;
mod family;
mod flow;
mod head;
mod learner;
mod model;
mod objective;
mod objective_identities;
mod ops;
mod parsing;
mod published;
mod random;
mod resume;
mod sampler;
mod scoring;
mod source;
mod tokenizer;
mod tokenizer_gguf;
mod toy;
