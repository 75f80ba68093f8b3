//! `candor bench`: its arguments.

use clap::Args;

use super::Failure;
use super::console::Console;
use super::models::{print, word};
use crate::bench::{Bench, Measurement, Settings, Shape};
use crate::config::{Device, Dtype};
use crate::event::Observer;
use crate::ops::kernel::Kernel;

const BENCH: &str = "\
Without a choice all four are measured, at the sizes of the defaults of
`candor train`. Every line has the median, and the seconds of each repetition.";

/// `candor bench`.
#[derive(Args)]
#[command(after_help = BENCH)]
pub struct Arguments {
    /// The model: a folder, a .gguf file, hf:org/name or pip:name==version
    model: String,
    /// Products of matrices: what this machine can do at best
    #[arg(long)]
    products: bool,
    /// Forward and backward: sequences x tokens, such as 4x256
    #[arg(long, value_name = "SHAPE", value_parser = learner)]
    learner: Option<Measurement>,
    /// Sampling: prompts x group x prompt tokens + new tokens, such as 32x150+128
    #[arg(long, value_name = "SHAPE", value_parser = Shape::parse)]
    decode: Option<Shape>,
    /// A whole GRPO step, such as 4x8x97+64
    #[arg(long, value_name = "SHAPE", value_parser = Shape::parse)]
    step: Option<Shape>,
    /// Repetitions of each
    #[arg(long, default_value_t = 5)]
    repeats: usize,
    /// Rank of the adapter on q, k, v and o
    #[arg(long, default_value_t = 16)]
    rank: usize,
    /// Rows per forward and backward pass
    #[arg(long, default_value_t = 4096)]
    micro_tokens: usize,
    /// What is computed in: f32, bf16, auto for the fastest, or int8 to decode only
    #[arg(long, value_parser = word::<Dtype>, default_value = "auto")]
    dtype: Dtype,
    /// With which instructions: amx, avx512_bf16, avx512 or gemm
    #[arg(long, value_parser = word::<Kernel>)]
    kernel: Option<Kernel>,
    /// Where: auto, cpu or cuda:N
    #[arg(long, value_parser = word::<Device>, default_value = "auto")]
    device: Device,
    /// Say nothing but errors and the result
    #[arg(long)]
    pub quiet: bool,
}

fn learner(text: &str) -> Result<Measurement, String> {
    let parts = text.split_once('x').and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
    match parts {
        Some((sequences, tokens)) if sequences > 0 && tokens > 1 => Ok(Measurement::Learner { sequences, tokens }),
        _ => Err("expected sequences x tokens, such as 4x256".into()),
    }
}

impl Arguments {
    /// Runs it.
    pub fn run(&self, observer: Observer, console: &Console) -> Result<u8, Failure> {
        let Self { model, repeats, rank, micro_tokens, dtype, kernel, device, .. } = self;
        let (repeats, rank, micro_tokens) = (*repeats, *rank, *micro_tokens);
        let settings =
            Settings { source: model, dtype: *dtype, kernel: *kernel, device: *device, rank, micro_tokens, repeats };
        let bench = Bench::prepare(&settings, observer).map_err(Failure::Input)?;
        for measurement in self.measurements() {
            let line = bench.measure(measurement).map_err(Failure::Run)?;
            print(&line, console).map_err(Failure::Run)?;
        }
        Ok(0)
    }

    fn measurements(&self) -> Vec<Measurement> {
        let asked = [
            self.products.then_some(Measurement::Products),
            self.learner,
            self.decode.map(Measurement::Decode),
            self.step.map(Measurement::Step),
        ];
        let asked: Vec<Measurement> = asked.into_iter().flatten().collect();
        if !asked.is_empty() {
            return asked;
        }
        vec![
            Measurement::Products,
            Measurement::Learner { sequences: 4, tokens: 256 },
            Measurement::Decode(Shape { prompts: 32, group: 1, prompt: 150, new: 128 }),
            Measurement::Step(Shape { prompts: 4, group: 8, prompt: 97, new: 64 }),
        ]
    }
}
