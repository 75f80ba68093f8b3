// Products of small matrices on tensor cores, and how their operands come into shared memory. The host puts this behind
// common.cuh.
//
// A warp multiplies [16, 16] with [16, 8] (PTX: mma.m16n8k16, compute capability 8.0 and later). Of the sum, lane 4 r +
// c holds columns 2 c and 2 c + 1 of rows r and r + 8. Matrices lie in shared memory row by row, rows D + 8 values
// apart, so that eight rows lie in different banks.

// What follows is replaced where there is no GPU: what warps do together, copies that take their time, and the memory
// that a launch comes with.
#ifndef CUDA_ON_HOST
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

// Ends the launch with an error if the host gave less dynamic shared memory.
__device__ __forceinline__ void require_shared(unsigned bytes) {
    unsigned given;
    asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(given));
    if (given < bytes) {
        asm volatile("trap;");
    }
}

__device__ __forceinline__ unsigned shared_address(const void *pointer) {
    unsigned address;
    asm("{ .reg .u64 a; cvta.to.shared.u64 a, %1; cvt.u32.u64 %0, a; }" : "=r"(address) : "l"(pointer));
    return address;
}

// sum += a * b.
__device__ __forceinline__ void multiply(float sum[4], const unsigned a[4], const unsigned b[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four [8, 8] matrices; lane i gives the address of row i % 8 of matrix i / 8, and receives of each columns 2 (i % 4)
// and the next of row i / 4.
__device__ __forceinline__ void load_matrices(unsigned to[4], const bf16 *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// The same of the transposed matrices.
__device__ __forceinline__ void load_transposed(unsigned to[4], const bf16 *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// Begins to copy 16 bytes to shared memory, or zeros.
__device__ __forceinline__ void copy_16(void *to, const void *from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(there ? 16 : 0)
                 : "memory");
}

// What was begun since the last call belongs together.
__device__ __forceinline__ void copies_begun() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits for all that this thread began but the last `under_way` groups.
template <int under_way> __device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(under_way) : "memory");
}
#endif

// A [16, 16] operand on the left, whose first row and column `corner` points to.
template <int stride> __device__ __forceinline__ void load_left(unsigned a[4], const bf16 *corner) {
    load_matrices(a, corner + LANE % 16 * stride + LANE / 16 * 8);
}

// Two [16, 8] operands on the right, side by side, from the rows of their transpose [16, 16].
template <int stride> __device__ __forceinline__ void load_right(unsigned b[4], const bf16 *corner) {
    load_matrices(b, corner + (LANE / 16 * 8 + LANE % 8) * stride + LANE / 8 % 2 * 8);
}

// The same from rows of their own.
template <int stride> __device__ __forceinline__ void load_right_rows(unsigned b[4], const bf16 *corner) {
    load_transposed(b, corner + LANE % 16 * stride + LANE / 16 * 8);
}

// sums [16, 8 n] += x [16, D] yᵀ for y [8 n, D].
template <int D, int n> __device__ __forceinline__ void add_dots(float sums[n][4], const bf16 *x, const bf16 *y) {
#pragma unroll
    for (int k = 0; k < D; k += 16) {
        unsigned a[4];
        load_left<D + 8>(a, x + k);
#pragma unroll
        for (int i = 0; i < n; i += 2) {
            unsigned b[4];
            load_right<D + 8>(b, y + i * 8 * (D + 8) + k);
            multiply(sums[i], a, b);
            multiply(sums[i + 1], a, b + 2);
        }
    }
}

// sums [16, 8 n] += a [16, 16] y for y [16, 8 n], a part of rows of D values.
template <int D, int n>
__device__ __forceinline__ void add_product(float sums[n][4], const unsigned a[4], const bf16 *y) {
#pragma unroll
    for (int i = 0; i < n; i += 2) {
        unsigned b[4];
        load_right_rows<D + 8>(b, y + i * 8);
        multiply(sums[i], a, b);
        multiply(sums[i + 1], a, b + 2);
    }
}

// Two sums side by side [16, 16] as an operand on the left.
__device__ __forceinline__ void as_left(unsigned a[4], const float first[4], const float second[4]) {
    a[0] = round_pair(first[0], first[1]);
    a[1] = round_pair(first[2], first[3]);
    a[2] = round_pair(second[0], second[1]);
    a[3] = round_pair(second[2], second[3]);
}

// Begins to copy one head of `rows` rows, `stride` values apart, into rows of D values. Rows from `count` on, and
// channels from `dim` on, become zeros. The copies of several calls belong together until copies_begun.
template <int D>
__device__ __forceinline__ void copy_rows(bf16 *to, const bf16 *from, long long stride, int rows, int count, int dim) {
    for (int i = threadIdx.x; i < rows * (D / 8); i += blockDim.x) {
        int row = i / (D / 8), channel = i % (D / 8) * 8;
        bool there = row < count && channel < dim;
        copy_16(to + row * (D + 8) + channel, there ? from + row * stride + channel : from, there);
    }
}

// Consecutive query rows of one sequence, and the key rows of its context: prefix before own.
struct Span {
    int query_start, query_len, prefix_start, prefix_len, own_start, own_len;
};

// Up to 64 queries of a span, or of its own keys.
struct Tile {
    int span, first;
};

#define TILE_ROWS 64

// The logical positions of keys that a query sees.
struct Visible {
    int begin, end;
    __device__ bool sees(int position) const { return begin <= position && position < end; }
};

__device__ __forceinline__ Visible visible(const Span &span, int query, int window) {
    int end = span.prefix_len + span.own_len - span.query_len + query + 1;
    return {window > 0 ? max(end - window, 0) : 0, end};
}

// Consecutive keys of a context that are taken together: never rows of both prefix and own.
struct Keys {
    int row, position, count;
};

// Stretches of `size` keys, of which prefix and own rows each begin with one: how many until this logical position.
__device__ __forceinline__ int stretches(const Span &span, int size, int position) {
    int prefix = min(position, span.prefix_len), own = max(position - span.prefix_len, 0);
    return (prefix + size - 1) / size + (own + size - 1) / size;
}

// The stretch that holds a position.
__device__ __forceinline__ int stretch_of(const Span &span, int size, int position) {
    return stretches(span, size, position + 1) - 1;
}

__device__ __forceinline__ Keys stretch(const Span &span, int size, int index) {
    int before = (span.prefix_len + size - 1) / size;
    if (index < before) {
        int first = index * size;
        return {span.prefix_start + first, first, min(size, span.prefix_len - first)};
    }
    int first = (index - before) * size;
    return {span.own_start + first, span.prefix_len + first, min(size, span.own_len - first)};
}

// c tanh(score / c) and its slope; without a cap both are exact.
struct Capped {
    float score, slope;
};

__device__ __forceinline__ Capped cap_score(float score, float soft_cap) {
    if (soft_cap <= 0.0f) {
        return {score, 1.0f};
    }
    float ratio = 1.0f - 2.0f / (1.0f + expf(2.0f / soft_cap * score));
    return {soft_cap * ratio, 1.0f - ratio * ratio};
}

__device__ __forceinline__ float exponential(float x) {
    return exp2f(1.4426950408889634f * x);
}
