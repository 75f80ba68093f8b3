//! What a device is asked to do: kernels with their arguments, and products.

use super::device::View;

/// One of both.
#[derive(Clone, Debug)]
pub enum Command {
    /// A kernel.
    Launch(String, Launch, Vec<Argument>),
    /// A product.
    Multiply(Product),
}

/// How many threads run a kernel.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    /// Blocks in three dimensions.
    pub grid: [usize; 3],
    /// Threads of a block.
    pub block: usize,
    /// Shared memory of a block beyond what the kernel declares, in bytes.
    pub shared: usize,
}

/// What a kernel is given.
#[derive(Clone, Copy, Debug)]
pub enum Argument {
    /// Where an array lies, or null.
    Pointer(u64),
    /// 64 bits.
    Long(u64),
    /// 32 bits.
    Int(i32),
    /// A single-precision number.
    Float(f32),
    /// A double-precision number.
    Double(f64),
}

macro_rules! argument {
    ($($kind:ty: $value:ident => $argument:expr;)*) => {$(
        impl From<$kind> for Argument {
            fn from($value: $kind) -> Self {
                $argument
            }
        }
    )*};
}

argument! {
    u64: value => Self::Long(value);
    i32: value => Self::Int(value);
    f32: value => Self::Float(value);
    f64: value => Self::Double(value);
}

impl<T> From<View<T>> for Argument {
    fn from(view: View<T>) -> Self {
        Self::Pointer(view.address())
    }
}

impl<T> From<Option<View<T>>> for Argument {
    /// Nothing is the null pointer.
    fn from(view: Option<View<T>>) -> Self {
        Self::Pointer(view.map_or(0, View::address))
    }
}

/// `c = scale · a · b`, or that is added to `c`: row-major, sums in f32.
#[derive(Clone, Copy, Debug)]
pub struct Product {
    /// [m, k].
    pub a: Operand,
    /// [k, n].
    pub b: Operand,
    /// [m, n] in f32, dense.
    pub c: u64,
    /// Rows of the product.
    pub m: usize,
    /// Columns of the product.
    pub n: usize,
    /// Terms of each sum.
    pub k: usize,
    /// Whether it is added.
    pub add: bool,
    /// What it is multiplied with.
    pub scale: f32,
    /// Whether `a` and `b` are f32, else bf16.
    pub floats: bool,
}

impl Product {
    /// A product of no bf16 numbers, which replaces what was there.
    pub const NONE: Self = {
        let nothing = Operand { address: 0, transposed: false };
        Self { a: nothing, b: nothing, c: 0, m: 0, n: 0, k: 0, add: false, scale: 1.0, floats: false }
    };
}

/// A dense matrix.
#[derive(Clone, Copy, Debug)]
pub struct Operand {
    /// Where it starts.
    pub address: u64,
    /// Whether it lies there with rows and columns exchanged.
    pub transposed: bool,
}
