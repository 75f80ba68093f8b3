//! The decoder on an NVIDIA GPU: the arithmetic of [`crate::ops`] in kernels of our own, with cuBLAS for products with weights.
//!
//! All but [`driver`] is compiled in every build: it asks a [`device::Device`] for memory, kernels and products, and tests put one
//! in its place that runs the same kernels on a processor.
//!
//! * [`device`]: what is asked of a device, and arrays in its memory
//! * [`kernels`]: the arguments of every kernel; the kernels are the `.cu` files beside it
//! * [`tensors`], [`factors`]: the frozen weights, and an adapter
//! * [`call`]: the rows of a forward call
//! * [`layer`], [`decoder`]: forward, backward, log-probabilities and choices

mod call;
pub(crate) mod decoder;
pub mod device;
pub(crate) mod factors;
pub(crate) mod kernels;
mod layer;
pub(crate) mod tensors;
