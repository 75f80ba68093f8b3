//! stub
pub mod advantage;
pub mod config;
pub mod evaluation;
pub mod learner;
pub mod model;
pub mod objective;
pub mod ops;
pub mod policy;
pub mod random;
//pub mod sampler;
//pub mod tokenizer;
