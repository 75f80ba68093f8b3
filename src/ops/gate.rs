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

/// Every row holds the gate, what is gated, and their product or its gradient, `width` values each. Side by side, because rows of
/// several matrices can lie so that the processor takes a value for one that was just written elsewhere (4 KB apart), and waits.
impl Activation {
    /// The product: `activation(gate) · up`.
    pub fn forward(self, rows: &mut [f32], width: usize) {
        vectorized(
            #[inline(always)]
            || {
                for row in rows.chunks_exact_mut(3 * width) {
                    let (pair, product) = row.split_at_mut(2 * width);
                    let (gate, up) = pair.split_at(width);
                    for ((product, gate), up) in product.iter_mut().zip(gate).zip(up) {
                        *product = self.value_and_slope(*gate).0 * up;
                    }
                }
            },
        );
    }

    /// The gradients of the gate and of what is gated in their place, given that of the product.
    pub fn backward(self, rows: &mut [f32], width: usize) {
        vectorized(
            #[inline(always)]
            || {
                for row in rows.chunks_exact_mut(3 * width) {
                    let (pair, grad) = row.split_at_mut(2 * width);
                    let (gate, up) = pair.split_at_mut(width);
                    for ((gate, up), grad) in gate.iter_mut().zip(up).zip(grad) {
                        let (value, slope) = self.value_and_slope(*gate);
                        *gate = *grad * *up * slope;
                        *up = *grad * value;
                    }
                }
            },
        );
    }
}
