//! AdamW with moments that can be saved, gradient clipping, and the learning-rate schedules.

use anyhow::{Result, ensure};
use candle_core::{DType, Tensor};

use crate::config::{Learner as Settings, Schedule};

/// AdamW (Loshchilov & Hutter 2019) over a fixed list of f32 tensors.
pub struct AdamW {
    /// First and second moment of every tensor, f32.
    pub moments: Vec<(Tensor, Tensor)>,
    /// Updates applied so far.
    pub updates: u64,
}

impl AdamW {
    /// Zero moments.
    ///
    /// # Errors
    /// If the device fails.
    pub fn new(parameters: &[Tensor]) -> Result<Self> {
        let zeros = |parameter: &Tensor| Ok((parameter.zeros_like()?, parameter.zeros_like()?));
        Ok(Self { moments: parameters.iter().map(zeros).collect::<Result<_>>()?, updates: 0 })
    }

    /// The parameters after one update: decoupled decay, then the bias-corrected step. The arithmetic is PyTorch's.
    ///
    /// # Errors
    /// If the device fails.
    pub fn update(
        &mut self,
        parameters: &[Tensor],
        gradients: &[Tensor],
        learning_rate: f64,
        settings: &Settings,
    ) -> Result<Vec<Tensor>> {
        self.updates += 1;
        let [beta1, beta2] = settings.betas;
        let correction1 = 1.0 - beta1.powf(self.updates as f64);
        let correction2 = (1.0 - beta2.powf(self.updates as f64)).sqrt();
        let pairs = parameters.iter().zip(gradients).zip(&mut self.moments);
        let update = |((parameter, gradient), (first, second)): ((&Tensor, &Tensor), &mut (Tensor, Tensor))| {
            *first = ((&*first * beta1)? + (gradient * (1.0 - beta1))?)?;
            *second = ((&*second * beta2)? + (gradient.sqr()? * (1.0 - beta2))?)?;
            let denominator = ((second.sqrt()? / correction2)? + settings.epsilon)?;
            let step = ((&*first * (learning_rate / correction1))? / denominator)?;
            let kept = (parameter * (1.0 - learning_rate * settings.weight_decay))?;
            Ok((kept - step)?)
        };
        pairs.map(update).collect()
    }
}

/// The L2 norm over all gradients, before they are scaled down in place so that it is at most `limit`.
///
/// # Errors
/// If a gradient is not finite: the first one's index is passed to `name`.
pub fn clip(gradients: &mut [Tensor], limit: f64, name: impl Fn(usize) -> String) -> Result<f64> {
    let mut squares = 0.0;
    for (index, gradient) in gradients.iter().enumerate() {
        let square = f64::from(gradient.sqr()?.sum_all()?.to_dtype(DType::F32)?.to_scalar::<f32>()?);
        ensure!(square.is_finite(), "the gradient of {} is not finite; lower learner.learning_rate", name(index));
        squares += square;
    }
    let norm = squares.sqrt();
    // PyTorch's clip_grad_norm_ adds 1e-6 too.
    let factor = limit / (norm + 1e-6);
    if factor < 1.0 {
        for gradient in gradients {
            *gradient = (&*gradient * factor)?;
        }
    }
    Ok(norm)
}

/// The learning rate of a step (from 0) of a run of `steps`: linear warm-up, then the schedule down to zero.
pub fn learning_rate(settings: &Settings, step: u64, steps: u64) -> f64 {
    let warmup = settings.warmup_steps;
    if step < warmup {
        return settings.learning_rate * (step + 1) as f64 / warmup as f64;
    }
    let done = (step - warmup) as f64 / (steps - warmup).max(1) as f64;
    settings.learning_rate
        * match settings.schedule {
            Schedule::Constant => 1.0,
            Schedule::Linear => 1.0 - done,
            Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
        }
}
