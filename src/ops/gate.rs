//! The gated activation of a feed-forward block: `activation(gate) · up` (Shazeer 2020, SwiGLU and GEGLU).

use super::{exp, vectorized};

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

impl Activation {
    /// `activation(gate) · up`, element by element.
    pub fn forward(self, gate: &[f32], up: &[f32], y: &mut [f32]) {
        vectorized(
            #[inline(always)]
            || {
                for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
                    *y = self.value_and_slope(*gate).0 * up;
                }
            },
        );
    }

    /// Replaces `gate` and `up` by their gradients, given that of the product.
    pub fn backward(self, grad: &[f32], gate: &mut [f32], up: &mut [f32]) {
        vectorized(
            #[inline(always)]
            || {
                for ((gate, up), grad) in gate.iter_mut().zip(up).zip(grad) {
                    let (value, slope) = self.value_and_slope(*gate);
                    *gate = grad * *up * slope;
                    *up = grad * value;
                }
            },
        );
    }
}
