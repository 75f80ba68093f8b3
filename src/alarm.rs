//! The alarm of strictly on-policy runs: where the sampler's version is the learner's, so must its log-probabilities be.

use anyhow::{Result, bail};

use crate::config::{Config, SamplerKind};
use crate::event::{Event, Observer};
use crate::learner::StepReport;
use crate::ops::kernel::Kernel;

/// Steps in a row whose log-probabilities differ too much: one may be a server that was restarted, or a damaged reply; what goes
/// on for three is how completions are sampled.
const STEPS: u64 = 3;

/// Listens for log-probabilities of the sampler that are not the learner's.
pub struct Alarm {
    /// The largest mean |ℓ − behavior ℓ| of a step, in nats; none where the sampler may be ahead.
    bound: Option<f64>,
    /// Steps above it until now.
    in_a_row: u64,
}

impl Alarm {
    /// For a run whose learner computes with this kernel.
    pub fn new(config: &Config, kernel: Kernel) -> Self {
        let bound = match config.sampling.kind {
            SamplerKind::Local if kernel.row_invariant() => 0.0,
            // Sums in another order, of which some are rounded to bf16 the other way.
            SamplerKind::Local if kernel == Kernel::Cuda => 2e-2,
            // Sums in another order: about 1e-6 each.
            SamplerKind::Local => 1e-3,
            // Other kernels: bf16 in two programs gives 0.03 to 0.04, with vLLM and SmolLM2.
            SamplerKind::Openai => 0.1,
        };
        Self { bound: (config.level() == 0).then_some(bound), in_a_row: 0 }
    }

    /// Warns of a step whose log-probabilities are out of bounds.
    ///
    /// # Errors
    /// If those before it were, too.
    pub fn hear(&mut self, step: u64, report: &StepReport, observer: Observer) -> Result<()> {
        let values = report.metrics.values();
        let named = ["mismatch/mean", "mismatch/max", "mismatch/k3"].map(|name| values.get(name).copied());
        let (Some(bound), [Some(mean), Some(max), Some(k3)]) = (self.bound, named) else { return Ok(()) };
        if mean <= bound {
            self.in_a_row = 0;
            return Ok(());
        }
        self.in_a_row += 1;
        let differ = format!(
            "the log-probabilities of sampler and learner differ by {mean:.3e} on average (at most {max:.3e}, k3 {k3:.3e}), where \
             both have one policy and at most {bound:e} is rounding"
        );
        if self.in_a_row < STEPS {
            observer(Event::Warning(&format!("step {step}: {differ}")));
            return Ok(());
        }
        bail!(
            "step {step}: {differ}, for {STEPS} steps in a row: check that the sampler has the learner's weights, adapter, chat \
             template and temperature; with sampling.async_level = 1 the run would go on with corrected ratios"
        )
    }
}
