// What all kernels share: bf16 as bits, sums and maxima of a block in a fixed order. The host puts this in front of
// every file, so that NVRTC needs no headers. The tests compile the same text with a C++ compiler
// (tests/data/cuda_on_host.h).

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

// Eight numbers that lie together.
struct alignas(16) Eight {
    unsigned pairs[4];
    __device__ float at(int i) const { return widen((bf16)(pairs[i / 2] >> i % 2 * 16)); }
};

// N numbers that are read or written at once.
template <int N> struct alignas(4 * N) Floats {
    float at[N];
};

template <int N> struct alignas(2 * N) Halves {
    bf16 at[N];
};

template <int N> __device__ __forceinline__ Floats<N> load(const float *from) {
    return *(const Floats<N> *)from;
}

template <int N> __device__ __forceinline__ void store(float *to, const Floats<N> &values) {
    *(Floats<N> *)to = values;
}

template <int N> __device__ __forceinline__ void store(bf16 *to, const Halves<N> &values) {
    *(Halves<N> *)to = values;
}

template <int N> __device__ __forceinline__ Halves<N> rounded(const Floats<N> &values) {
    Halves<N> halves;
#pragma unroll
    for (int i = 0; i < N; i++) {
        halves.at[i] = round_bf16(values.at[i]);
    }
    return halves;
}

// Calls body.at<4>(i) for every fourth i that is the thread's where `places`, all addresses together, allow it, and
// body.at<1>(i) for what is left. Memory is only kept busy by reading several numbers at once.
template <typename Body>
__device__ __forceinline__ void in_fours(long long first, long long stride, long long n, u64 places, Body &&body) {
    long long fours = places % 16 == 0 ? n / 4 : 0;
    for (long long i = first; i < fours; i += stride) {
        body.template at<4>(4 * i);
    }
    for (long long i = 4 * fours + first; i < n; i += stride) {
        body.template at<1>(i);
    }
}

// An address for in_fours.
__device__ __forceinline__ u64 place(const float *x) {
    return (u64)x;
}

__device__ __forceinline__ u64 place(const bf16 *x) {
    return 2 * (u64)x;
}

// The same of rows of some width, whichever it is: what is summed up together must not depend on where a row lies.
__device__ __forceinline__ u64 place(const float *rows, int width) {
    return place(rows) | width % 4;
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
