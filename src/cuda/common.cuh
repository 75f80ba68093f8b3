// What all kernels share: bf16 as bits, sums and maxima of a block in a fixed order. The host puts this in front of every file, so
// that NVRTC needs no headers. The tests compile the same text with a C++ compiler (tests/data/cuda_on_host.h).

typedef unsigned short bf16;
typedef unsigned long long u64;

#define LANES 32
#define ALL_LANES 0xffffffffu
#define WARP (threadIdx.x / LANES)
#define LANE (threadIdx.x % LANES)
#define MINUS_INFINITY __uint_as_float(0xff800000u)

// The first element of a thread where a grid shares n of them, and how far the next ones lie.
#define FIRST ((long long)blockIdx.x * blockDim.x + threadIdx.x)
#define STRIDE ((long long)gridDim.x * blockDim.x)

__device__ __forceinline__ float widen(bf16 x) {
    return __uint_as_float((unsigned)x << 16);
}

// The nearest bf16, ties to even; NaN stays NaN.
__device__ __forceinline__ bf16 round_bf16(float x) {
    unsigned bits = __float_as_uint(x);
    unsigned rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return x != x ? (bf16)0x7fc0u : (bf16)rounded;
}

// Two of them in one register, the first in the lower half.
__device__ __forceinline__ unsigned round_pair(float first, float second) {
#ifdef CUDA_ON_HOST
    return (unsigned)round_bf16(first) | (unsigned)round_bf16(second) << 16;
#else
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
#endif
}

struct Sum {
    template <typename T> __device__ static T of(T a, T b) { return a + b; }
};

struct Maximum {
    template <typename T> __device__ static T of(T a, T b) { return a > b ? a : b; }
};

// What all lanes of a warp hold, taken together; every lane receives it.
template <typename Operation, typename T> __device__ __forceinline__ T warp_reduce(T value) {
    for (int offset = LANES / 2; offset > 0; offset /= 2) {
        value = Operation::of(value, __shfl_xor_sync(ALL_LANES, value, offset));
    }
    return value;
}

// The same over a block of whole warps. Every thread of it must call this.
template <typename Operation, typename T> __device__ __forceinline__ T block_reduce(T value) {
    __shared__ T parts[LANES];
    value = warp_reduce<Operation>(value);
    // The array may still be read from an earlier call.
    __syncthreads();
    if (LANE == 0) {
        parts[WARP] = value;
    }
    __syncthreads();
    T total = parts[0];
    for (int warp = 1; warp < (int)blockDim.x / LANES; warp++) {
        total = Operation::of(total, parts[warp]);
    }
    return total;
}
