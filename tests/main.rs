//! All integration tests, in one binary.

mod check;
mod model;
mod learner;
