//! All integration tests, in one binary.

#![allow(clippy::unwrap_used, missing_docs)]

mod advantage;
mod binary;
mod boolq;
mod check;
mod commands;
mod config;
mod config_layers;
mod config_page;
mod evaluation;
mod failures;
mod flow;
mod head;
mod hostile;
mod hub;
mod hub_server;
mod inputs;
mod learner;
mod model;
mod objective;
mod objective_identities;
mod ops;
mod parsing;
mod program;
mod random;
mod resume;
mod rows;
mod sampler;
mod scoring;
mod source;
mod tokenizer;
mod toy;
mod weights;
