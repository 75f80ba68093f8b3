// Attention over a tree of keys, forward; the twin of ops/attention.rs. Grouped queries, soft-cap (0 = none) and
// sliding window (0 = none). The gradients are those of attention_backward.cu.
//
// Keys and values lie in stores [key rows, key_heads * dim] of bf16. A span is consecutive query rows of one sequence
// and the key rows of its context, prefix before own, as ops::attention::Span has them: query i sees the first context
// - query_len + i + 1 logical positions, or the last `window` of these. Prefix and own rows are walked in stretches of
// so many keys from their first on, in order, so a query's result is the same bits whatever else is computed. One block
// computes one query head of up to 64 queries of a span; products are those of tensor cores (bf16 in, sums in f32), and
// what goes into them is rounded: scaled queries, weights.
//
// dim is a multiple of 8 (for attention_rows: even), at most 256; head groups (query_heads / key_heads) are any size.
// Kernels with a number in their name are for dim <= that: take the smallest that fits (64, 128, 256: D). They take
// dynamic shared memory, which the host must allow first (CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES).
//
// struct Span { int query_start, query_len, prefix_start, prefix_len, own_start, own_len; }
// struct Tile { int span, first; } `first` counts from the span's query_start, a multiple of 64. Longest contexts first
//                                    keep all multiprocessors busy to the end.
//
//   store_heads(queries, keys, values, query_gain_or_null, key_gain_or_null, epsilon, cosines, sines, to_row,
//           key_store, value_store, rows, query_heads, key_heads, dim) (rows; 256)
//       Normalizes each head of queries and keys if there is a gain [dim], and rotates it. Queries are replaced; keys
//       and values [rows, key_heads * dim] are rounded into rows to_row[i] of the stores, unless that is -1.
//   attention_rows(queries, key_store, value_store, row_span, spans, out_or_null, out_rounded_or_null,
//           log_sums_or_null, rows, query_heads, key_heads, dim, scale, soft_cap, window) (rows, key_heads, ceil(group
//           / 8); 256)
//       For decoding: one query row at a time, walking its keys as fast as memory gives them. row_span[i] is the span
//       of row i; -1 leaves the row alone. It needs no tiles, so it computes any call; on long spans it is slow.
//   attention_forward_{64,128,256}(queries, key_store, value_store, tiles, spans, out_or_null, out_rounded_or_null,
//           log_sums_or_null, query_heads, key_heads, dim, scale, soft_cap, window) (tiles, query_heads; 128; dynamic
//           shared memory 256 * (D + 8) bytes)
//       queries and out [rows, query_heads * dim] in f32, out also rounded; log_sums [rows, query_heads].

// Normalizes a head if there is a gain, and rotates it: a warp calls write(channel, value).
template <typename Write> __device__ void turn_head(const float *x, const float *gain_or_null, float epsilon,
                                                    const float *cosine, const float *sine, int dim, Write write) {
    float inverse = 1.0f;
    if (gain_or_null) {
        float squares = 0.0f;
        for (int i = LANE; i < dim; i += LANES) {
            squares += x[i] * x[i];
        }
        inverse = (float)(1.0 / sqrt(warp_reduce<Sum>((double)squares) / dim + (double)epsilon));
    }
    for (int i = LANE, half = dim / 2; i < half; i += LANES) {
        float a = x[i] * inverse * (gain_or_null ? gain_or_null[i] : 1.0f);
        float b = x[i + half] * inverse * (gain_or_null ? gain_or_null[i + half] : 1.0f);
        write(i, a * cosine[i] - b * sine[i]);
        write(i + half, b * cosine[i] + a * sine[i]);
    }
}

// One head to a warp: those of queries, keys and values one after the other.
extern "C" __global__ void store_heads(float *queries, const float *keys, const float *values,
                                       const float *query_gain_or_null, const float *key_gain_or_null, float epsilon,
                                       const float *cosines, const float *sines, const int *to_row, bf16 *key_store,
                                       bf16 *value_store, int rows, int query_heads, int key_heads, int dim) {
    long long row = blockIdx.x, to = (long long)to_row[row] * key_heads * dim;
    const float *cosine = cosines + row * (dim / 2), *sine = sines + row * (dim / 2);
    int heads = to_row[row] < 0 ? query_heads : query_heads + 2 * key_heads;
    for (int head = WARP; head < heads; head += blockDim.x / LANES) {
        int key_head = head < query_heads ? 0 : (head - query_heads) % key_heads;
        const float *key = keys + (row * key_heads + key_head) * dim,
                    *value = values + (row * key_heads + key_head) * dim;
        bf16 *to_key = key_store + to + key_head * dim, *to_value = value_store + to + key_head * dim;
        if (head < query_heads) {
            float *query = queries + (row * query_heads + head) * dim;
            turn_head(query, query_gain_or_null, epsilon, cosine, sine, dim, [&](int i, float y) { query[i] = y; });
        } else if (head < query_heads + key_heads) {
            turn_head(key, key_gain_or_null, epsilon, cosine, sine, dim,
                      [&](int i, float y) { to_key[i] = round_bf16(y); });
        } else {
            for (int i = LANE; i < dim; i += LANES) {
                to_value[i] = round_bf16(value[i]);
            }
        }
    }
}

// Where results go; what is null is not wanted.
struct Outputs {
    float *out;
    bf16 *rounded;
    float *log_sums;
    __device__ void write(long long at, float value) const {
        if (out) {
            out[at] = value;
        }
        if (rounded) {
            rounded[at] = round_bf16(value);
        }
    }
};

// The shape of attention in a layer.
struct Heads {
    int query, key, dim;
    float scale, soft_cap;
    int window;
    __device__ int group() const { return query / key; }
};

// One query row at a time.

// Query heads of one block, one per warp where weights are made, and keys that are taken together.
#define ROW_HEADS 8
#define ROW_KEYS 64
#define ROW_THREADS 256
#define MAX_DIM 256
// Lanes that share a key.
#define KEY_LANES 8

struct alignas(16) RowScratch {
    float queries[ROW_HEADS][MAX_DIM];
    float scores[ROW_HEADS][ROW_KEYS];
    float weights[ROW_HEADS][ROW_KEYS];
    float factors[ROW_HEADS];
    float sums[ROW_HEADS];
    float combined[ROW_HEADS][2 * ROW_THREADS];
};

// Those of a head from a channel on. Where heads are no multiples of 8, they lie anywhere, and the last ones are zeros.
__device__ Eight load_eight(const bf16 *head, int channel, int dim) {
    if (dim % 8 == 0) {
        return *(const Eight *)(head + channel);
    }
    Eight values = {};
    for (int i = 0; i < 4 && channel + 2 * i < dim; i++) {
        values.pairs[i] = *(const unsigned *)(head + channel + 2 * i);
    }
    return values;
}

// The scores of some keys, for all heads of the block: eight lanes share a key, so that a warp reads whole rows of
// four.
__device__ void row_scores(RowScratch &shared, const bf16 *keys, long long stride, int count, int heads, int dim) {
    int lane = threadIdx.x % KEY_LANES;
    for (int key = threadIdx.x / KEY_LANES; key < ROW_KEYS; key += ROW_THREADS / KEY_LANES) {
        float dots[ROW_HEADS] = {};
        for (int channel = lane * 8; channel < dim && key < count; channel += KEY_LANES * 8) {
            Eight values = load_eight(keys + key * stride, channel, dim);
#pragma unroll
            for (int head = 0; head < ROW_HEADS; head++) {
                if (head < heads) {
#pragma unroll
                    for (int i = 0; i < 8; i++) {
                        dots[head] += shared.queries[head][channel + i] * values.at(i);
                    }
                }
            }
        }
#pragma unroll
        for (int head = 0; head < ROW_HEADS; head++) {
            if (head < heads) {
#pragma unroll
                for (int offset = KEY_LANES / 2; offset > 0; offset /= 2) {
                    dots[head] += __shfl_xor_sync(ALL_LANES, dots[head], offset);
                }
                if (lane == head) {
                    shared.scores[head][key] = dots[head];
                }
            }
        }
    }
}

// The running maximum of a head's scores, and the sum of their exponentials.
struct Running {
    float max, sum;
};

// The warp's own head: weights relative to the new maximum, and what earlier sums are multiplied with.
__device__ void row_weights(RowScratch &shared, Running &running, const Keys &keys, const Visible &seen,
                            float soft_cap) {
    int head = WARP;
    float scores[2], most = running.max;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int key = LANE + i * LANES;
        bool sees = key < keys.count && seen.sees(keys.position + key);
        scores[i] = sees ? cap_score(shared.scores[head][key], soft_cap).score : MINUS_INFINITY;
        most = fmaxf(most, scores[i]);
    }
    most = warp_reduce<Maximum>(most);
    float from = most == MINUS_INFINITY ? 0.0f : most, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float weight = exponential(scores[i] - from);
        shared.weights[head][LANE + i * LANES] = weight;
        sum += weight;
    }
    float factor = exponential(running.max - from);
    running = {most, running.sum * factor + warp_reduce<Sum>(sum)};
    if (LANE == 0) {
        shared.factors[head] = factor;
    }
}

// A thread's share of the weighted values: two channels, of every `splits`-th key.
struct RowShare {
    int pair, split, splits;
    float sums[ROW_HEADS][2];

    __device__ RowShare(int dim)
        : pair(threadIdx.x % (dim / 2)), split(threadIdx.x / (dim / 2)), splits(ROW_THREADS / (dim / 2)) {
        for (int head = 0; head < ROW_HEADS; head++) {
            sums[head][0] = sums[head][1] = 0.0f;
        }
    }

    __device__ void add(const RowScratch &shared, const bf16 *values, long long stride, int count, int heads) {
#pragma unroll
        for (int head = 0; head < ROW_HEADS; head++) {
            float factor = head < heads ? shared.factors[head] : 0.0f;
            sums[head][0] *= factor;
            sums[head][1] *= factor;
        }
        // Threads that are left over have no share.
#pragma unroll 4
        for (int key = split < splits ? split : count; key < count; key += splits) {
            unsigned both = *(const unsigned *)(values + key * stride + 2 * pair);
            float first = widen((bf16)both), second = widen((bf16)(both >> 16));
#pragma unroll
            for (int head = 0; head < ROW_HEADS; head++) {
                if (head < heads) {
                    sums[head][0] += shared.weights[head][key] * first;
                    sums[head][1] += shared.weights[head][key] * second;
                }
            }
        }
    }

    __device__ void keep(RowScratch &shared, int dim) const {
        if (split < splits) {
#pragma unroll
            for (int head = 0; head < ROW_HEADS; head++) {
                shared.combined[head][split * dim + 2 * pair] = sums[head][0];
                shared.combined[head][split * dim + 2 * pair + 1] = sums[head][1];
            }
        }
    }
};

extern "C" __global__ void __launch_bounds__(ROW_THREADS)
    attention_rows(const float *queries, const bf16 *key_store, const bf16 *value_store, const int *row_span,
                   const Span *spans, float *out_or_null, bf16 *out_rounded_or_null, float *log_sums_or_null, int rows,
                   int query_heads, int key_heads, int dim, float scale, float soft_cap, int window) {
    __shared__ RowScratch shared;
    int row = blockIdx.x, key_head = blockIdx.y, group = query_heads / key_heads;
    if (row_span[row] < 0) {
        return;
    }
    Span span = spans[row_span[row]];
    Visible seen = visible(span, row - span.query_start, window);
    int first_head = key_head * group + blockIdx.z * ROW_HEADS,
        heads = min(group - (int)blockIdx.z * ROW_HEADS, ROW_HEADS);
    long long query_at = ((long long)row * query_heads + first_head) * dim, stride = (long long)key_heads * dim;
    for (int i = threadIdx.x; i < heads * MAX_DIM; i += ROW_THREADS) {
        int head = i / MAX_DIM, channel = i % MAX_DIM;
        bool there = channel < dim;
        shared.queries[head][channel] =
            there ? widen(round_bf16(scale * queries[query_at + head * dim + channel])) : 0.0f;
    }
    __syncthreads();
    Running running = {MINUS_INFINITY, 0.0f};
    RowShare share(dim);
    int last = stretches(span, ROW_KEYS, seen.end);
    for (int index = stretch_of(span, ROW_KEYS, seen.begin); index < last; index++) {
        Keys keys = stretch(span, ROW_KEYS, index);
        long long at = keys.row * stride + key_head * dim;
        row_scores(shared, key_store + at, stride, keys.count, heads, dim);
        __syncthreads();
        if (WARP < heads) {
            row_weights(shared, running, keys, seen, soft_cap);
        }
        __syncthreads();
        share.add(shared, value_store + at, stride, keys.count, heads);
    }
    share.keep(shared, dim);
    if (LANE == 0) {
        shared.sums[WARP] = running.sum;
        if (log_sums_or_null && WARP < heads) {
            log_sums_or_null[(long long)row * query_heads + first_head + WARP] = running.max + logf(running.sum);
        }
    }
    __syncthreads();
    Outputs outputs = {out_or_null, out_rounded_or_null, log_sums_or_null};
    for (int i = threadIdx.x; i < heads * dim; i += ROW_THREADS) {
        float sum = 0.0f;
        for (int split = 0; split < share.splits; split++) {
            sum += shared.combined[i / dim][split * dim + i % dim];
        }
        outputs.write(query_at + i, sum / shared.sums[i / dim]);
    }
}

// Tiles of queries.

#define FORWARD_KEYS 32
#define FORWARD_STEPS (FORWARD_KEYS / 8)

// Rounds one head of the tile's queries, scaled, into rows of D values; what is not there becomes zero.
template <int D>
__device__ void load_queries(bf16 *to, const float *from, long long stride, int count, int dim, float scale) {
    for (int i = threadIdx.x; i < TILE_ROWS * (D / 2); i += blockDim.x) {
        int row = i / (D / 2), channel = i % (D / 2) * 2;
        bool there = row < count && channel < dim;
        const float *pair = from + row * stride + channel;
        *(unsigned *)(to + row * (D + 8) + channel) = there ? round_pair(scale * pair[0], scale * pair[1]) : 0u;
    }
}

// A warp's 16 queries: each lane has a part of two of them, rows LANE / 4 and that plus 8.
template <int D> struct Attending {
    float combined[D / 8][4];
    float max[2], sum[2];
    Visible seen[2];

    // Replaces scores by weights relative to the new maximum.
    __device__ void weigh(float scores[FORWARD_STEPS][4], const Keys &keys, float soft_cap) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float most = max[half];
#pragma unroll
            for (int i = 0; i < FORWARD_STEPS * 2; i++) {
                float &score = scores[i / 2][half * 2 + i % 2];
                int key = i / 2 * 8 + LANE % 4 * 2 + i % 2;
                bool sees = key < keys.count && seen[half].sees(keys.position + key);
                score = sees ? cap_score(score, soft_cap).score : MINUS_INFINITY;
                most = fmaxf(most, score);
            }
            most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 1));
            most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 2));
            float from = most == MINUS_INFINITY ? 0.0f : most, factor = exponential(max[half] - from);
            max[half] = most;
            sum[half] *= factor;
#pragma unroll
            for (int i = 0; i < FORWARD_STEPS * 2; i++) {
                float &score = scores[i / 2][half * 2 + i % 2];
                score = exponential(score - from);
                sum[half] += score;
            }
#pragma unroll
            for (int i = 0; i < D / 8; i++) {
                combined[i][half * 2] *= factor;
                combined[i][half * 2 + 1] *= factor;
            }
        }
    }

    // Adds the weighted values.
    __device__ void combine(const float weights[FORWARD_STEPS][4], const bf16 *values) {
#pragma unroll
        for (int i = 0; i < FORWARD_STEPS; i += 2) {
            unsigned a[4];
            as_left(a, weights[i], weights[i + 1]);
            add_product<D, D / 8>(combined, a, values + i * 8 * (D + 8));
        }
    }
};

// While the keys are multiplied with, the values come in, and the other way round.
template <int D> __device__ void attend_tile(const float *queries, const bf16 *key_store, const bf16 *value_store,
                                             const Tile &tile, const Span &span, const Outputs &outputs,
                                             const Heads &heads) {
    DYNAMIC_SHARED(shared);
    require_shared(256 * (D + 8));
    bf16 *own = (bf16 *)shared, *keys_at = own + TILE_ROWS * (D + 8), *values_at = keys_at + FORWARD_KEYS * (D + 8);
    int head = blockIdx.y, count = min(TILE_ROWS, span.query_len - tile.first), width = heads.query * heads.dim;
    long long stride = (long long)heads.key * heads.dim, column = head / heads.group() * heads.dim;
    long long first_row = span.query_start + tile.first;
    int index = stretch_of(span, FORWARD_KEYS, visible(span, tile.first, heads.window).begin);
    int last = stretches(span, FORWARD_KEYS, visible(span, tile.first + count - 1, heads.window).end);
    Keys keys = stretch(span, FORWARD_KEYS, index);
    copy_rows<D>(keys_at, key_store + keys.row * stride + column, stride, FORWARD_KEYS, keys.count, heads.dim);
    copies_begun();
    load_queries<D>(own, queries + first_row * width + head * heads.dim, width, count, heads.dim, heads.scale);
    Attending<D> rows = {};
    for (int half = 0; half < 2; half++) {
        int query = WARP * 16 + LANE / 4 + half * 8;
        rows.max[half] = MINUS_INFINITY;
        rows.seen[half] = query < count ? visible(span, tile.first + query, heads.window) : Visible{0, 0};
    }
    for (; index < last; index++) {
        wait_for_copies<0>();
        __syncthreads();
        copy_rows<D>(values_at, value_store + keys.row * stride + column, stride, FORWARD_KEYS, keys.count, heads.dim);
        copies_begun();
        float scores[FORWARD_STEPS][4] = {};
        add_dots<D, FORWARD_STEPS>(scores, own + WARP * 16 * (D + 8), keys_at);
        wait_for_copies<0>();
        __syncthreads();
        Keys current = keys;
        if (index + 1 < last) {
            keys = stretch(span, FORWARD_KEYS, index + 1);
            copy_rows<D>(keys_at, key_store + keys.row * stride + column, stride, FORWARD_KEYS, keys.count, heads.dim);
        }
        copies_begun();
        rows.weigh(scores, current, heads.soft_cap);
        rows.combine(scores, values_at);
    }
    for (int half = 0; half < 2; half++) {
        int query = WARP * 16 + LANE / 4 + half * 8;
        float sum = rows.sum[half] + __shfl_xor_sync(ALL_LANES, rows.sum[half], 1);
        sum += __shfl_xor_sync(ALL_LANES, sum, 2);
        if (query >= count) {
            continue;
        }
        long long row = first_row + query;
#pragma unroll
        for (int i = 0; i < D / 8; i++) {
            for (int j = 0; j < 2; j++) {
                int channel = i * 8 + LANE % 4 * 2 + j;
                if (channel < heads.dim) {
                    outputs.write(row * width + head * heads.dim + channel, rows.combined[i][half * 2 + j] / sum);
                }
            }
        }
        if (outputs.log_sums && LANE % 4 == 0) {
            outputs.log_sums[row * heads.query + head] = rows.max[half] + logf(sum);
        }
    }
}

#define ATTENTION_FORWARD(D)                                                                                        \
    extern "C" __global__ void __launch_bounds__(128) attention_forward_##D(                                        \
        const float *queries, const bf16 *key_store, const bf16 *value_store, const Tile *tiles, const Span *spans, \
        float *out_or_null, bf16 *out_rounded_or_null, float *log_sums_or_null, int query_heads, int key_heads,     \
        int dim, float scale, float soft_cap, int window) {                                                         \
        Tile tile = tiles[blockIdx.x];                                                                              \
        Outputs outputs = {out_or_null, out_rounded_or_null, log_sums_or_null};                                     \
        Heads heads = {query_heads, key_heads, dim, scale, soft_cap, window};                                       \
        attend_tile<D>(queries, key_store, value_store, tile, spans[tile.span], outputs, heads);                    \
    }

ATTENTION_FORWARD(64)
ATTENTION_FORWARD(128)
ATTENTION_FORWARD(256)
