// The point-wise parts of a layer, dropout and the optimizer; the twins of ops/{norm,rope,gate,dropout}.rs and
// learner/optimizer.rs.
//
// Matrices are row-major and dense. "(rows; 256)" is a launch of so many blocks of so many threads. Where n elements
// are spread, any number of blocks will do: min(ceil(n / 256), 65535) is a good one, called "spread" here.
//
//   embed(ids, table, scale, out, rows, width) (rows; 256) out = scale * table[ids]
//   rope_tables(positions, frequencies, cosines, sines, rows, half) (spread over rows * half; 256)
//   round_rows(x, out, n) (spread; 256)
//   adapter_parts(values, parts, scale, rank, narrow, wide) (spread over rank * (narrow + wide); 256)
//       values: A [rank, narrow] and B [wide, rank]; parts: A [2 * rank, narrow] and scale * B^T [2 * rank, wide], what
//       bf16 holds of them above what that leaves.
//   add_bias(y, bias, rows, width) (rows; 256)
//   select_rows(x, index, out, rows, width) (rows; 256) out[i] = x[index[i]]
//   rms_norm(x, gain, epsilon, out_or_null, rounded_or_null, rows, width) (rows; 256) out may be x
//   residual_norm(x, returned, output_gain_or_null, gain_or_null, epsilon, sum, rounded_or_null, rows, width) (rows;
//           256)
//       What comes between two blocks: sum = x + returned, which is normalized first if there is an output gain; and
//       its norm, rounded, if there is a gain. sum may be x or returned.
//   rms_norm_backward(x, gain, epsilon, grad, dx, rows, width) (rows; 256) adds to dx, which may not be grad
//   rms_norm_backward_at(x, gain, epsilon, grad, dx, at, order, segment_start, segments, width) (segments; 256)
//       Row i of grad belongs to row at[i] of x and dx. Several may belong to one: `order` lists the rows of grad
//       sorted by at (stably), and segment s is order[segment_start[s]..segment_start[s + 1]], all with one `at`.
//   rope(heads, cosines, sines, rows, head_count, dim, sign) (rows; 128) in place; sign -1 turns back
//   gate(gate, up, product, activation, n) (spread; 256) activation 0 SiLU, 1 GELU in its tanh form
//   gate_backward(d_product, gate, up, d_gate, d_up, d_gate_rounded, d_up_rounded, product_or_null, activation, n)
//           (spread; 256) any output may be null, d_gate may be gate or d_product, d_up may be up
//   adapter_down(parts, rows, rank, part_count, scale, values, left) (rows; 128)
//       parts [rows, part_count * rank]; values [rows, rank] = scale * their sum; left [rows, part_count * rank] =
//       that, rounded, part_count times. `scale` is dropout's 1 / (1 - p), or 1.
//   adapter_down_rows(x, matrix, rows, rank, part_count, width, scale, values, left) (rows; 256)
//       The same from the rounded inputs [rows, width] and the matrix [part_count * rank, width] itself: for few rows,
//       where one launch is quicker than two.
//   mask_rounded(x, out, row_keys, bound, layer, projection, rows, width) (rows; 256) what is dropped becomes 0; out
//           may be x
//   mask_floats(x, out, row_keys, bound, layer, projection, rows, width) (rows; 256)
//   mask_add(x, y, row_keys, bound, layer, projection, rows, width) (rows; 256) y += x where it is not dropped
//       bound = (u64)(p * 2^64); row_keys are Dropout::rows.
//   adamw(p, updated, m, v, g, learning_rate, beta1, beta2, epsilon, decay, correction1, correction2, gradient_scale,
//           n) (spread; 256)
//       correction1 = 1 - beta1^t, correction2 = sqrt(1 - beta2^t); g is scaled first (clipping). updated may be p.
//   sum_of_squares(g, parts, n) (256; 256) parts [256]; the host adds them in order

extern "C" __global__ void embed(const unsigned *ids, const bf16 *table, float scale, float *out, int rows, int width) {
    const bf16 *from = table + (long long)ids[blockIdx.x] * width;
    float *to = out + (long long)blockIdx.x * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        to[i] = scale * widen(from[i]);
    }
}

// The angle is rounded to f32, as transformers does: at high positions that is part of the model.
extern "C" __global__ void rope_tables(const unsigned *positions, const float *frequencies, float *cosines,
                                       float *sines, int rows, int half) {
    for (long long i = FIRST; i < (long long)rows * half; i += STRIDE) {
        float angle = (float)positions[i / half] * frequencies[i % half];
        cosines[i] = cosf(angle);
        sines[i] = sinf(angle);
    }
}

struct Rounding {
    const float *x;
    bf16 *out;
    template <int N> __device__ void at(long long i) { store(out + i, rounded(load<N>(x + i))); }
};

extern "C" __global__ void round_rows(const float *x, bf16 *out, long long n) {
    in_fours(FIRST, STRIDE, n, place(x) | place(out), Rounding{x, out});
}

extern "C" __global__ void adapter_parts(const float *values, bf16 *parts, float scale, int rank, int narrow,
                                         int wide) {
    long long of_a = (long long)rank * narrow, of_b = (long long)rank * wide;
    for (long long i = FIRST; i < of_a + of_b; i += STRIDE) {
        bool is_a = i < of_a;
        long long j = i - of_a;
        float x = is_a ? values[i] : scale * values[of_a + j % wide * rank + j / wide];
        bf16 *high = parts + (is_a ? i : of_a + i), held = round_bf16(x);
        *high = held;
        high[is_a ? of_a : of_b] = round_bf16(x - widen(held));
    }
}

extern "C" __global__ void add_bias(float *y, const float *bias, int rows, int width) {
    float *row = y + (long long)blockIdx.x * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        row[i] += bias[i];
    }
}

extern "C" __global__ void select_rows(const float *x, const unsigned *index, float *out, int rows, int width) {
    const float *from = x + (long long)index[blockIdx.x] * width;
    float *to = out + (long long)blockIdx.x * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        to[i] = from[i];
    }
}

// 1 / sqrt(mean(x^2) + epsilon) of a row, for every thread of the block. Few terms are summed in f32, the many threads'
// sums in f64: this decides every value of the row.
__device__ float inverse_rms(const float *x, float epsilon, int width) {
    float squares = 0.0f;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        squares += x[i] * x[i];
    }
    double mean = block_reduce<Sum>((double)squares) / width;
    return (float)(1.0 / sqrt(mean + (double)epsilon));
}

extern "C" __global__ void rms_norm(const float *x, const float *gain, float epsilon, float *out_or_null,
                                    bf16 *rounded_or_null, int rows, int width) {
    long long start = (long long)blockIdx.x * width;
    float inverse = inverse_rms(x + start, epsilon, width);
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float y = x[start + i] * inverse * gain[i];
        if (out_or_null) {
            out_or_null[start + i] = y;
        }
        if (rounded_or_null) {
            rounded_or_null[start + i] = round_bf16(y);
        }
    }
}

extern "C" __global__ void residual_norm(const float *x, const float *returned, const float *output_gain_or_null,
                                         const float *gain_or_null, float epsilon, float *sum, bf16 *rounded_or_null,
                                         int rows, int width) {
    long long start = (long long)blockIdx.x * width;
    float inverse = output_gain_or_null ? inverse_rms(returned + start, epsilon, width) : 1.0f;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float y = output_gain_or_null ? returned[start + i] * inverse * output_gain_or_null[i] : returned[start + i];
        sum[start + i] = y + x[start + i];
    }
    if (gain_or_null) {
        // Each thread reads what it wrote itself.
        inverse = inverse_rms(sum + start, epsilon, width);
        for (int i = threadIdx.x; i < width; i += blockDim.x) {
            rounded_or_null[start + i] = round_bf16(sum[start + i] * inverse * gain_or_null[i]);
        }
    }
}

// Adds inverse * (g - x * inverse^2 * mean(g * x)) to dx, g being grad(i) * gain[i].
template <typename Gradient> __device__ void rms_norm_row_backward(const float *x, const float *gain, float epsilon,
                                                                   Gradient grad, float *dx, int width) {
    float inverse = inverse_rms(x, epsilon, width);
    float terms = 0.0f;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        terms += x[i] * (grad(i) * gain[i]);
    }
    float pull = (float)(block_reduce<Sum>((double)terms) / width) * inverse * inverse;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        dx[i] += inverse * (grad(i) * gain[i] - x[i] * pull);
    }
}

struct RowGradient {
    const float *row;
    __device__ float operator()(int i) const { return row[i]; }
};

// The sum of some rows, in their order.
struct SegmentGradient {
    const float *grad;
    const unsigned *rows;
    int count, width;
    __device__ float operator()(int i) const {
        float sum = 0.0f;
        for (int row = 0; row < count; row++) {
            sum += grad[(long long)rows[row] * width + i];
        }
        return sum;
    }
};

extern "C" __global__ void rms_norm_backward(const float *x, const float *gain, float epsilon, const float *grad,
                                             float *dx, int rows, int width) {
    long long start = (long long)blockIdx.x * width;
    RowGradient row = {grad + start};
    rms_norm_row_backward(x + start, gain, epsilon, row, dx + start, width);
}

// The gradient is linear in grad, so rows that belong together are added before.
extern "C" __global__ void rms_norm_backward_at(const float *x, const float *gain, float epsilon, const float *grad,
                                                float *dx, const unsigned *at, const unsigned *order,
                                                const unsigned *segment_start, int segments, int width) {
    const unsigned *rows = order + segment_start[blockIdx.x];
    int count = (int)(segment_start[blockIdx.x + 1] - segment_start[blockIdx.x]);
    long long start = (long long)at[rows[0]] * width;
    SegmentGradient sum = {grad, rows, count, width};
    rms_norm_row_backward(x + start, gain, epsilon, sum, dx + start, width);
}

extern "C" __global__ void rope(float *heads, const float *cosines, const float *sines, int rows, int head_count,
                                int dim, float sign) {
    int half = dim / 2;
    const float *cosine = cosines + (long long)blockIdx.x * half, *sine = sines + (long long)blockIdx.x * half;
    float *row = heads + (long long)blockIdx.x * head_count * dim;
    for (int i = threadIdx.x; i < head_count * half; i += blockDim.x) {
        float *first = row + i / half * dim + i % half, *second = first + half;
        float c = cosine[i % half], s = sign * sine[i % half], a = *first, b = *second;
        *first = a * c - b * s;
        *second = b * c + a * s;
    }
}

struct Activated {
    float value, slope;
};

__device__ __forceinline__ Activated activated(float x, int activation) {
    if (activation == 0) {
        float sigmoid = 1.0f / (1.0f + expf(-x));
        return {x * sigmoid, sigmoid * (1.0f + x * (1.0f - sigmoid))};
    }
    const float c = 0.7978846f; // sqrt(2 / pi)
    float inner = c * (x + 0.044715f * x * x * x);
    float half = 1.0f / (1.0f + expf(-2.0f * inner)); // (1 + tanh(u)) / 2
    return {x * half, half + 2.0f * x * half * (1.0f - half) * c * (1.0f + 3.0f * 0.044715f * x * x)};
}

struct Gating {
    const float *gate, *up;
    bf16 *product;
    int activation;
    template <int N> __device__ void at(long long i) {
        Floats<N> own = load<N>(gate + i), gated = load<N>(up + i);
#pragma unroll
        for (int j = 0; j < N; j++) {
            own.at[j] = activated(own.at[j], activation).value * gated.at[j];
        }
        store(product + i, rounded(own));
    }
};

extern "C" __global__ void gate(const float *gate, const float *up, bf16 *product, int activation, long long n) {
    u64 places = place(gate) | place(up) | place(product);
    in_fours(FIRST, STRIDE, n, places, Gating{gate, up, product, activation});
}

// Where there is room for it.
template <typename T, typename Values>
__device__ __forceinline__ void store_if(T *to, long long i, const Values &values) {
    if (to) {
        store(to + i, values);
    }
}

struct GatingBackward {
    const float *d_product, *gate, *up;
    float *d_gate, *d_up, *product;
    bf16 *d_gate_rounded, *d_up_rounded;
    int activation;
    template <int N> __device__ void at(long long i) {
        Floats<N> to_gate = load<N>(d_product + i), own = load<N>(gate + i), gated = load<N>(up + i), to_up;
#pragma unroll
        for (int j = 0; j < N; j++) {
            Activated of_gate = activated(own.at[j], activation);
            to_up.at[j] = to_gate.at[j] * of_gate.value;
            to_gate.at[j] *= gated.at[j] * of_gate.slope;
            gated.at[j] *= of_gate.value;
        }
        store_if(d_gate, i, to_gate);
        store_if(d_up, i, to_up);
        store_if(product, i, gated);
        store_if(d_gate_rounded, i, rounded(to_gate));
        store_if(d_up_rounded, i, rounded(to_up));
    }
};

extern "C" __global__ void gate_backward(const float *d_product, const float *gate, const float *up, float *d_gate,
                                         float *d_up, bf16 *d_gate_rounded, bf16 *d_up_rounded, float *product_or_null,
                                         int activation, long long n) {
    u64 places = place(d_product) | place(gate) | place(up) | place(d_gate) | place(d_up) | place(product_or_null) |
                 place(d_gate_rounded) | place(d_up_rounded);
    GatingBackward body = {d_product,       gate,           up,           d_gate,    d_up,
                           product_or_null, d_gate_rounded, d_up_rounded, activation};
    in_fours(FIRST, STRIDE, n, places, body);
}

extern "C" __global__ void adapter_down(const float *parts, int rows, int rank, int part_count, float scale,
                                        float *values, bf16 *left) {
    int wide = rank * part_count;
    const float *from = parts + (long long)blockIdx.x * wide;
    for (int i = threadIdx.x; i < rank; i += blockDim.x) {
        float sum = from[i];
        for (int part = 1; part < part_count; part++) {
            sum += from[part * rank + i];
        }
        sum *= scale;
        values[(long long)blockIdx.x * rank + i] = sum;
        for (int part = 0; part < part_count; part++) {
            left[(long long)blockIdx.x * wide + part * rank + i] = round_bf16(sum);
        }
    }
}

// The dot product of two rows, for every lane of a warp; eight numbers at a time where they lie that way.
__device__ float row_dot(const bf16 *x, const bf16 *y, int width) {
    float sum = 0.0f;
    bool eights = width % 8 == 0 && ((u64)x | (u64)y) % 16 == 0;
    int whole = eights ? width : 0;
    for (int i = LANE * 8; i < whole; i += LANES * 8) {
        Eight a = *(const Eight *)(x + i), b = *(const Eight *)(y + i);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            sum += a.at(j) * b.at(j);
        }
    }
    for (int i = whole + LANE; i < width; i += LANES) {
        sum += widen(x[i]) * widen(y[i]);
    }
    return warp_reduce<Sum>(sum);
}

extern "C" __global__ void adapter_down_rows(const bf16 *x, const bf16 *matrix, int rows, int rank, int part_count,
                                             int width, float scale, float *values, bf16 *left) {
    const bf16 *row = x + (long long)blockIdx.x * width;
    bf16 *to = left + (long long)blockIdx.x * part_count * rank;
    for (int i = WARP; i < rank; i += blockDim.x / LANES) {
        float sum = row_dot(row, matrix + (long long)i * width, width);
        for (int part = 1; part < part_count; part++) {
            sum += row_dot(row, matrix + (long long)(part * rank + i) * width, width);
        }
        sum *= scale;
        if (LANE == 0) {
            values[(long long)blockIdx.x * rank + i] = sum;
        }
        for (int part = LANE; part < part_count; part += LANES) {
            to[part * rank + i] = round_bf16(sum);
        }
    }
}

// Random numbers as random.rs has them: a hash of a key and counters begins a SplitMix64 stream, of which a channel has
// its own number.
#define GAMMA 0x9e3779b97f4a7c15ull
#define DROPOUT 4ull

__device__ __forceinline__ u64 mix(u64 value) {
    value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9ull;
    value = (value ^ (value >> 27)) * 0x94d049bb133111ebull;
    return value ^ (value >> 31);
}

__device__ __forceinline__ u64 absorb(u64 hash, u64 value) {
    return mix((hash + GAMMA) ^ mix(value));
}

// What decides about one row of the inputs of a projection.
struct Mask {
    u64 stream, bound;
    __device__ Mask(u64 row_key, u64 bound, int layer, int projection)
        : stream(absorb(absorb(absorb(mix(row_key), DROPOUT), (u64)layer), (u64)projection)), bound(bound) {}
    __device__ bool drops(int channel) const { return mix(stream + GAMMA * ((u64)channel + 1)) < bound; }
};

template <typename T>
__device__ void mask_row(const T *x, T *out, const u64 *row_keys, u64 bound, int layer, int projection, int width) {
    Mask mask(row_keys[blockIdx.x], bound, layer, projection);
    long long start = (long long)blockIdx.x * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        out[start + i] = mask.drops(i) ? (T)0 : x[start + i];
    }
}

extern "C" __global__ void mask_rounded(const bf16 *x, bf16 *out, const u64 *row_keys, u64 bound, int layer,
                                        int projection, int rows, int width) {
    mask_row(x, out, row_keys, bound, layer, projection, width);
}

extern "C" __global__ void mask_floats(const float *x, float *out, const u64 *row_keys, u64 bound, int layer,
                                       int projection, int rows, int width) {
    mask_row(x, out, row_keys, bound, layer, projection, width);
}

extern "C" __global__ void mask_add(const float *x, float *y, const u64 *row_keys, u64 bound, int layer, int projection,
                                    int rows, int width) {
    Mask mask(row_keys[blockIdx.x], bound, layer, projection);
    long long start = (long long)blockIdx.x * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        y[start + i] += mask.drops(i) ? 0.0f : x[start + i];
    }
}

// Constants are rounded to f32 after they were computed in f64, as the CPU's optimizer does: 1 - beta2 has few digits
// in f32.
extern "C" __global__ void adamw(const float *p, float *updated, float *m, float *v, const float *g,
                                 double learning_rate, double beta1, double beta2, double epsilon, double decay,
                                 double correction1, double correction2, double gradient_scale, long long n) {
    float keep1 = (float)beta1, take1 = (float)(1.0 - beta1), keep2 = (float)beta2, take2 = (float)(1.0 - beta2);
    float rate = (float)(learning_rate / correction1), kept = (float)(1.0 - learning_rate * decay);
    float inverse2 = (float)(1.0 / correction2), scale = (float)gradient_scale;
    for (long long i = FIRST; i < n; i += STRIDE) {
        float gradient = scale * g[i];
        float first = m[i] * keep1 + gradient * take1;
        float second = v[i] * keep2 + gradient * gradient * take2;
        m[i] = first;
        v[i] = second;
        updated[i] = p[i] * kept - first * rate / (sqrtf(second) * inverse2 + (float)epsilon);
    }
}

extern "C" __global__ void sum_of_squares(const float *g, double *parts, long long n) {
    double sum = 0.0;
    for (long long i = FIRST; i < n; i += STRIDE) {
        sum += (double)g[i] * (double)g[i];
    }
    sum = block_reduce<Sum>(sum);
    if (threadIdx.x == 0) {
        parts[blockIdx.x] = sum;
    }
}
