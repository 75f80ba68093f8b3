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

/// x · σ(x) and its derivative.
#[inline(always)]
fn silu(x: f32) -> (f32, f32) {
    let sigmoid = 1.0 / (1.0 + exp(-x));
    (x * sigmoid, sigmoid * (1.0 + x * (1.0 - sigmoid)))
}

/// x · (1 + tanh(u)) / 2 with u = sqrt(2 / π) · (x + 0.044715 x³), and its derivative.
#[inline(always)]
fn gelu_tanh(x: f32) -> (f32, f32) {
    const C: f32 = 0.797_884_6; // sqrt(2 / π)
    let inner = C * (x + 0.044_715 * x * x * x);
    // (1 + tanh(u)) / 2 = σ(2u)
    let half = 1.0 / (1.0 + exp(-2.0 * inner));
    let slope = half + 2.0 * x * half * (1.0 - half) * C * (1.0 + 3.0 * 0.044_715 * x * x);
    (x * half, slope)
}

/// Every row holds the gate, what is gated, and their product or its gradient, `width` values each. Side by side, because rows of
/// several matrices can lie so that the processor takes a value for one that was just written elsewhere (4 KB apart), and waits.
impl Activation {
    /// The product: `activation(gate) · up`.
    pub fn forward(self, rows: &mut [f32], width: usize) {
        // Each by itself: in one loop the compiler computes both for every value.
        match self {
            Self::Silu => forward(silu, rows, width),
            Self::GeluTanh => forward(gelu_tanh, rows, width),
        }
    }

    /// The gradients of the gate and of what is gated in their place, given that of the product.
    pub fn backward(self, rows: &mut [f32], width: usize) {
        match self {
            Self::Silu => backward(silu, rows, width),
            Self::GeluTanh => backward(gelu_tanh, rows, width),
        }
    }
}

fn forward(activation: impl Fn(f32) -> (f32, f32), rows: &mut [f32], width: usize) {
    vectorized(
        #[inline(always)]
        || {
            for row in rows.chunks_exact_mut(3 * width) {
                let (pair, product) = row.split_at_mut(2 * width);
                let (gate, up) = pair.split_at(width);
                for ((product, gate), up) in product.iter_mut().zip(gate).zip(up) {
                    *product = activation(*gate).0 * up;
                }
            }
        },
    );
}

fn backward(activation: impl Fn(f32) -> (f32, f32), rows: &mut [f32], width: usize) {
    vectorized(
        #[inline(always)]
        || {
            for row in rows.chunks_exact_mut(3 * width) {
                let (pair, grad) = row.split_at_mut(2 * width);
                let (gate, up) = pair.split_at_mut(width);
                for ((gate, up), grad) in gate.iter_mut().zip(up).zip(grad) {
                    let (value, slope) = activation(*gate);
                    *gate = *grad * *up * slope;
                    *up = *grad * value;
                }
            }
        },
    );
}
