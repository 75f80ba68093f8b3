//! The gated activation of a feed-forward block: `activation(gate) · up` (Shazeer 2020, SwiGLU and GEGLU).

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::{exp, output, values, vectorized, with_values};

/// The activation of the gate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// x · σ(x): Llama, Qwen.
    Silu,
    /// GELU in its tanh form: Gemma.
    GeluTanh,
}

impl Activation {
    /// The value and the derivative at `x`.
    #[inline(always)]
    fn value_and_slope(self, x: f32) -> (f32, f32) {
        match self {
            Self::Silu => {
                let sigmoid = 1.0 / (1.0 + exp(-x));
                (x * sigmoid, sigmoid * (1.0 + x * (1.0 - sigmoid)))
            }
            Self::GeluTanh => {
                const C: f32 = 0.797_884_6; // sqrt(2 / π)
                let inner = C * (x + 0.044_715 * x * x * x);
                // (1 + tanh(u)) / 2 = σ(2u)
                let half = 1.0 / (1.0 + exp(-2.0 * inner));
                let slope = half + 2.0 * x * half * (1.0 - half) * C * (1.0 + 3.0 * 0.044_715 * x * x);
                (x * half, slope)
            }
        }
    }
}

/// `activation(gate) · up`, element by element.
///
/// # Errors
/// If the shapes differ or a tensor is not f32.
pub fn gated(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    if gate.dims() != up.dims() {
        bail!("gated activation: a gate of {:?} for {:?}", gate.dims(), up.dims());
    }
    gate.apply_op2(up, Gated(activation))
}

struct Gated(Activation);

/// Values handled by one task of the thread pool.
const CHUNK: usize = 16 * 1024;

impl CustomOp2 for Gated {
    fn name(&self) -> &'static str {
        "gated-activation"
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (gate, up) = (values(gate, gate_layout)?, values(up, up_layout)?);
        let mut y = vec![0.0; gate.len()];
        let inputs = gate.par_chunks(CHUNK).zip(up.par_chunks(CHUNK));
        y.par_chunks_mut(CHUNK).zip(inputs).for_each(|(y, (gate, up))| {
            vectorized(
                #[inline(always)]
                || {
                    for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
                        *y = self.0.value_and_slope(*gate).0 * up;
                    }
                },
            );
        });
        output(y, gate_layout.shape())
    }

    fn bwd(&self, gate: &Tensor, up: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let (mut d_gate, mut d_up) = (vec![0.0; gate.elem_count()], vec![0.0; gate.elem_count()]);
        with_values([gate, up, &grad], |[gate, up, grad]| {
            let inputs = gate.par_chunks(CHUNK).zip(up.par_chunks(CHUNK)).zip(grad.par_chunks(CHUNK));
            let outputs = d_gate.par_chunks_mut(CHUNK).zip(d_up.par_chunks_mut(CHUNK));
            outputs.zip(inputs).for_each(|((d_gate, d_up), ((gate, up), grad))| {
                vectorized(
                    #[inline(always)]
                    || {
                        for i in 0..gate.len() {
                            let (value, slope) = self.0.value_and_slope(gate[i]);
                            d_gate[i] = grad[i] * up[i] * slope;
                            d_up[i] = grad[i] * value;
                        }
                    },
                );
            });
        })?;
        let tensor = |values| Tensor::from_vec(values, gate.shape(), gate.device());
        Ok((Some(tensor(d_gate)?), Some(tensor(d_up)?)))
    }
}
