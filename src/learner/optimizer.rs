//! AdamW with moments that can be saved, gradient clipping, and the learning-rate schedules.

use std::sync::Arc;

use anyhow::{Result, bail, ensure};
use candle_core::{DType, Tensor};

use crate::config::{Learner as Settings, Schedule};
use crate::cuda::device::Gpu;
use crate::cuda::optimizer;
use crate::model::Gradients;
use crate::policy::{Adapter, numbers};

/// AdamW (Loshchilov & Hutter 2019) over all tensors of an adapter, in f32 and where their gradients are.
pub struct AdamW {
    moments: Moments,
    updates: u64,
}

/// First and second moments.
enum Moments {
    /// Of every tensor.
    Host([Vec<Tensor>; 2]),
    Gpu(optimizer::Moments),
}

/// The constants of one update.
pub(crate) struct Update {
    pub learning_rate: f64,
    /// Decay rates of the first and second moment.
    pub betas: [f64; 2],
    pub epsilon: f64,
    /// Decoupled weight decay of every tensor.
    pub decay: f64,
    /// 1 − β₁ᵗ and √(1 − β₂ᵗ).
    pub corrections: [f64; 2],
    /// What gradients are multiplied with to be clipped: at most 1.
    pub scale: f64,
}

impl AdamW {
    /// Zero moments for an adapter, on the GPU that its gradients will be on, if one computes them.
    ///
    /// # Errors
    /// If the device fails.
    pub fn new(adapter: &Adapter, gpu: Option<&Arc<Gpu>>) -> Result<Self> {
        let zeros = || adapter.host_tensors()?.iter().map(|tensor| Ok(tensor.zeros_like()?)).collect::<Result<_>>();
        let moments = match gpu {
            None => Moments::Host([zeros()?, zeros()?]),
            Some(gpu) => Moments::Gpu(optimizer::Moments::zeros(gpu, adapter.numbers())?),
        };
        Ok(Self { moments, updates: 0 })
    }

    /// Updates applied so far.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// The first and the second moment of every tensor, in the order of [`Adapter::tensors`].
    ///
    /// # Errors
    /// If the device fails.
    pub fn moments(&self, adapter: &Adapter) -> Result<[Vec<Tensor>; 2]> {
        match &self.moments {
            Moments::Host(moments) => Ok(moments.clone()),
            Moments::Gpu(moments) => {
                let [first, second] = moments.download()?;
                Ok([adapter.layout().tensors(&first)?, adapter.layout().tensors(&second)?])
            }
        }
    }

    /// Goes on after so many updates that left these moments.
    ///
    /// # Errors
    /// If the device fails.
    pub fn restore(&mut self, moments: [Vec<Tensor>; 2], updates: u64) -> Result<()> {
        self.updates = updates;
        match &mut self.moments {
            Moments::Host(held) => *held = moments,
            Moments::Gpu(held) => held.upload([&numbers(&moments[0])?, &numbers(&moments[1])?])?,
        }
        Ok(())
    }

    /// One update of an adapter, its gradients scaled down first so that their L2 norm is at most `max_grad_norm`. Returns the norm
    /// before that.
    ///
    /// # Errors
    /// If a gradient is not finite, or the device fails. Nothing is updated then.
    pub fn step(
        &mut self,
        adapter: &mut Adapter,
        gradients: Gradients,
        learning_rate: f64,
        settings: &Settings,
    ) -> Result<f64> {
        let updates = self.updates + 1;
        let update = |norm| Update::new(settings, learning_rate, updates, norm);
        let norm = match (&mut self.moments, gradients) {
            (Moments::Host(moments), gradients) => {
                let gradients = gradients.into_tensors(adapter)?;
                let norm = norm(&gradients, adapter)?;
                adapter.replace(update(norm).apply(adapter.host_tensors()?, &gradients, moments)?);
                norm
            }
            (Moments::Gpu(moments), Gradients::Gpu(gradient)) => {
                let squares = moments.squares(&gradient)?;
                let finite = (squares as f32).is_finite();
                // The tensor that it is the fault of is found on this processor.
                let not_finite = || norm(&adapter.layout().tensors(&gradient.download()?)?, adapter);
                let norm = if finite { squares.sqrt() } else { not_finite()? };
                moments.update(adapter, &gradient, &update(norm))?;
                norm
            }
            (Moments::Gpu(_), Gradients::Host(_)) => bail!("the gradients are not on the GPU that the moments are on"),
        };
        self.updates = updates;
        Ok(norm)
    }
}

impl Update {
    fn new(settings: &Settings, learning_rate: f64, updates: u64, norm: f64) -> Self {
        let &Settings { betas, epsilon, weight_decay: decay, max_grad_norm, .. } = settings;
        let corrections = [1.0 - betas[0].powf(updates as f64), (1.0 - betas[1].powf(updates as f64)).sqrt()];
        // PyTorch's clip_grad_norm_ adds 1e-6 too.
        let scale = (max_grad_norm / (norm + 1e-6)).min(1.0);
        Self { learning_rate, betas, epsilon, decay, corrections, scale }
    }

    /// The parameters afterwards: decoupled decay, then the bias-corrected step. The arithmetic is PyTorch's.
    fn apply(
        &self,
        parameters: &[Tensor],
        gradients: &[Tensor],
        moments: &mut [Vec<Tensor>; 2],
    ) -> Result<Vec<Tensor>> {
        let Self { learning_rate, betas: [beta1, beta2], epsilon, decay, corrections, scale } = *self;
        let [first, second] = moments;
        let all = parameters.iter().zip(gradients).zip(first.iter_mut().zip(second));
        let update = |((parameter, gradient), (first, second)): ((&Tensor, &Tensor), (&mut Tensor, &mut Tensor))| {
            let gradient = if scale < 1.0 { (gradient * scale)? } else { gradient.clone() };
            *first = ((&*first * beta1)? + (&gradient * (1.0 - beta1))?)?;
            *second = ((&*second * beta2)? + (gradient.sqr()? * (1.0 - beta2))?)?;
            let denominator = ((second.sqrt()? / corrections[1])? + epsilon)?;
            let step = ((&*first * (learning_rate / corrections[0]))? / denominator)?;
            let kept = (parameter * (1.0 - learning_rate * decay))?;
            Ok((kept - step)?)
        };
        all.map(update).collect()
    }
}

/// The L2 norm over all gradients.
///
/// # Errors
/// If one is not finite: the first one's name is told.
fn norm(gradients: &[Tensor], adapter: &Adapter) -> Result<f64> {
    let mut squares = 0.0;
    for (name, gradient) in adapter.names().zip(gradients) {
        let square = f64::from(gradient.sqr()?.sum_all()?.to_dtype(DType::F32)?.to_scalar::<f32>()?);
        ensure!(square.is_finite(), "the gradient of {name} is not finite; lower learner.learning_rate");
        squares += square;
    }
    Ok(squares.sqrt())
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
