//! Candor trains small language models to know what they know: GRPO with LoRA, from one TOML file, on one machine.
//!
//! In reading order:
//!
//! * [`cli`]: the command line; what `main` calls
//! * [`train`]: the loop; [`flow`]: sampler and learner side by side; [`timeline`]: what they are doing
//! * [`setup`]: a run that is ready for its first step
//! * [`inputs`], [`model_files`]: the model's files and the environments, opened and found to fit together
//! * [`plan`], [`check`]: what a run would do and need, and what is odd about it
//! * [`heldout`]: held-out tasks, completed and scored
//! * [`prompts`], [`logprob`], [`sample`], [`chat`]: rows of prompts and conversations, and what a
//!   model makes of them
//! * [`prepare`]: from questions to what is trained on
//! * [`export`]: a model with its adapter merged, for other programs
//! * [`selection`]: which tasks a step takes
//! * [`rollout`]: tasks are sampled and scored, and become groups
//! * [`given`]: tasks that carry their completions become trees
//! * [`scorers`]: completions are scored as they end
//! * [`judge`], [`grades`]: who decides whether an answer is right, and what all decisions amount to
//! * [`advantage`]: the rewards of a group become advantages
//! * [`objective`]: log-probabilities become a loss and its derivative, in plain floats
//! * [`alarm`]: sampler and learner must agree
//! * [`learner`]: trees of completions become one optimizer step
//! * [`sampler`]: prompts become completions
//! * [`probe`]: whether servers that sample have the model that is trained
//! * [`policy`]: the adapter
//! * [`model`]: the frozen decoder, described by data
//! * [`ops`]: fused operations with exact backward
//! * [`tokenizer`]: text, tokens and the chat template
//! * [`client`]: one request to a server
//! * [`config`], [`source`], [`run`], [`checkpoint`], [`peft`], [`tensors`]: what is read, fetched and written
//! * [`evaluation`]: metrics of confidences, in plain floats
//! * [`calibration`], [`comparison`], [`routed`], [`calibration_map`]: what the rows of evaluations say by them
//! * [`metrics`], [`record`], [`summary`], [`tensorboard`]: what came of a run
//! * [`generations`]: recorded rollouts, read again; [`rescore`], [`rescored`]: scored again;
//!   [`inspect`]: looked into; [`report`]: shown
//! * [`printable`]: a model's text on a terminal
//! * [`bench`]: how fast a machine samples and learns
//! * [`random`], [`event`]: random numbers by counter, and what a run tells whoever watches

pub mod advantage;
pub mod alarm;
pub mod bench;
pub mod calibration;
pub mod calibration_map;
pub mod chat;
pub mod check;
pub mod checkpoint;
pub mod cli;
pub mod client;
pub mod comparison;
pub mod config;
pub mod cuda;
pub mod evaluation;
pub mod event;
pub mod export;
pub mod flow;
pub mod generations;
pub mod given;
pub mod grades;
pub mod heldout;
pub mod inputs;
pub mod inspect;
pub mod judge;
pub mod learner;
pub mod logprob;
pub mod metrics;
pub mod model;
pub mod model_files;
pub mod objective;
pub mod ops;
pub mod peft;
pub mod plan;
pub mod policy;
pub mod prepare;
pub mod printable;
pub mod probe;
pub mod prompts;
pub mod random;
pub mod record;
pub mod report;
pub mod rescore;
pub mod rescored;
pub mod rollout;
pub mod routed;
pub mod run;
pub mod sample;
pub mod sampler;
pub mod scorers;
pub mod selection;
pub mod setup;
pub mod source;
pub mod summary;
pub mod tensorboard;
pub mod tensors;
pub mod timeline;
pub mod tokenizer;
pub mod train;
