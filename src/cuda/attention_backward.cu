// The gradients of attention over a tree of keys; the twin of ops/attention.rs::backward. Shapes, spans and shared
// memory are those of attention.cu. With P the weights, D = rowsum(dO · O) and dS = P · (dO Vᵀ − D): dQ = dS K, dK =
// dSᵀ Q, dV = Pᵀ dO (Dao et al. 2022, algorithm 4). Weights are computed again from the log-sums. Nothing is added from
// several blocks, so that the sums' order is fixed.
//
//   attention_backward_begin(queries, scale, out, grad, queries_rounded, grad_rounded, pulls, rows, query_heads, dim)
//           (rows, query_heads; 32)
//       What both others need: scale * queries and grad, rounded [rows, query_heads * dim], and pulls [rows,
//       query_heads] = rowsum(grad · out).
//   attention_backward_queries_{64,128,256}(queries_rounded, key_store, value_store, grad_rounded, log_sums, pulls,
//           tiles, spans, d_queries, query_heads, key_heads, dim, scale, soft_cap, window) (tiles, query_heads; 128;
//           dynamic shared memory 384 * (D + 8) bytes)
//       d_queries [rows, query_heads * dim], written.
//   attention_backward_keys_{64,128,256}(queries_rounded, key_store, value_store, grad_rounded, log_sums, pulls, tiles,
//           spans, reader_start, readers, d_keys, d_values, query_heads, key_heads, dim, soft_cap, window) (key tiles,
//           key_heads; 256; dynamic shared memory 512 * (D + 8) + 10752 bytes)
//       d_keys, d_values [rows of the call, key_heads * dim], written. A tile's `first` counts from the span's
//       own_start. Whole trees only: own_len == query_len for every span, so that key row own_start + i is the call's
//       row query_start + i. readers[reader_start[s]..reader_start[s + 1]] are the spans that see the own keys of span
//       s: itself, and those whose prefix they are. They are summed up in this order.

extern "C" __global__ void attention_backward_begin(const float *queries, float scale, const float *out,
                                                    const float *grad, bf16 *queries_rounded, bf16 *grad_rounded,
                                                    float *pulls, int rows, int query_heads, int dim) {
    long long at = (long long)blockIdx.x * query_heads + blockIdx.y;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < dim; i += blockDim.x) {
        float gradient = grad[at * dim + i];
        sum += gradient * out[at * dim + i];
        grad_rounded[at * dim + i] = round_bf16(gradient);
        queries_rounded[at * dim + i] = round_bf16(scale * queries[at * dim + i]);
    }
    sum = warp_reduce<Sum>(sum);
    if (threadIdx.x == 0) {
        pulls[at] = sum;
    }
}

// What both gradients read.
struct Saved {
    const bf16 *queries, *keys, *values, *grad;
    const float *log_sums, *pulls;
};

struct Shape {
    int query_heads, key_heads, dim;
    float soft_cap;
    int window;
    __device__ int group() const { return query_heads / key_heads; }
    __device__ long long query_width() const { return (long long)query_heads * dim; }
    __device__ long long key_width() const { return (long long)key_heads * dim; }
};

// A weight, and the gradient of its score before the cap.
struct Pair {
    float weight, d_score;
};

__device__ __forceinline__ Pair score_gradient(float score, float d_weight, float log_sum, float pull, float soft_cap,
                                               bool sees) {
    Capped capped = cap_score(score, soft_cap);
    float weight = sees ? exponential(capped.score - log_sum) : 0.0f;
    return {weight, sees ? weight * (d_weight - pull) * capped.slope : 0.0f};
}

#define KEYS 32
#define STEPS (KEYS / 8)

// Of the queries of a warp, each lane has a part of two: rows LANE / 4 and that plus 8.
struct QueryRows {
    Visible seen[2];
    float log_sums[2], pulls[2];

    __device__ void load(const Saved &saved, const Shape &shape, const Span &span, int first, int count, int head) {
        for (int half = 0; half < 2; half++) {
            int query = WARP * 16 + LANE / 4 + half * 8;
            bool there = query < count;
            long long at = (long long)(span.query_start + first + query) * shape.query_heads + head;
            seen[half] = there ? visible(span, first + query, shape.window) : Visible{0, 0};
            log_sums[half] = there ? saved.log_sums[at] : 0.0f;
            pulls[half] = there ? saved.pulls[at] : 0.0f;
        }
    }

    // Replaces scores by their gradients, given those of their weights.
    __device__ void gradients(float scores[STEPS][4], const float d_weights[STEPS][4], const Keys &keys,
                              float soft_cap) const {
#pragma unroll
        for (int i = 0; i < STEPS * 4; i++) {
            int half = i % 4 / 2, key = i / 4 * 8 + LANE % 4 * 2 + i % 2;
            bool sees = key < keys.count && seen[half].sees(keys.position + key);
            float &score = scores[i / 4][i % 4];
            score = score_gradient(score, d_weights[i / 4][i % 4], log_sums[half], pulls[half], soft_cap, sees).d_score;
        }
    }
};

// Four warps, 16 queries each. While one matrix is multiplied with, the next values come in.
template <int D> __device__ void queries_backward(const Saved &saved, const Tile &tile, const Span &span,
                                                  float *d_queries, const Shape &shape, float scale) {
    DYNAMIC_SHARED(shared);
    require_shared(384 * (D + 8));
    bf16 *own = (bf16 *)shared, *grads = own + TILE_ROWS * (D + 8), *keys_at = grads + TILE_ROWS * (D + 8);
    bf16 *values_at = keys_at + KEYS * (D + 8);
    int head = blockIdx.y, count = min(TILE_ROWS, span.query_len - tile.first), dim = shape.dim;
    long long stride = shape.key_width(), width = shape.query_width(), column = head / shape.group() * dim;
    long long at = (span.query_start + tile.first) * width + head * dim;
    int index = stretch_of(span, KEYS, visible(span, tile.first, shape.window).begin);
    int last = stretches(span, KEYS, visible(span, tile.first + count - 1, shape.window).end);
    Keys keys = stretch(span, KEYS, index);
    copy_rows<D>(own, saved.queries + at, width, TILE_ROWS, count, dim);
    copy_rows<D>(grads, saved.grad + at, width, TILE_ROWS, count, dim);
    copy_rows<D>(keys_at, saved.keys + keys.row * stride + column, stride, KEYS, keys.count, dim);
    copy_rows<D>(values_at, saved.values + keys.row * stride + column, stride, KEYS, keys.count, dim);
    copies_begun();
    QueryRows rows;
    rows.load(saved, shape, span, tile.first, count, head);
    float sums[D / 8][4] = {};
    for (; index < last; index++) {
        wait_for_copies<0>();
        __syncthreads();
        float scores[STEPS][4] = {}, d_weights[STEPS][4] = {};
        add_dots<D, STEPS>(scores, own + WARP * 16 * (D + 8), keys_at);
        add_dots<D, STEPS>(d_weights, grads + WARP * 16 * (D + 8), values_at);
        __syncthreads();
        bool more = index + 1 < last;
        Keys next = more ? stretch(span, KEYS, index + 1) : keys;
        if (more) {
            copy_rows<D>(values_at, saved.values + next.row * stride + column, stride, KEYS, next.count, dim);
        }
        rows.gradients(scores, d_weights, keys, shape.soft_cap);
#pragma unroll
        for (int i = 0; i < STEPS; i += 2) {
            unsigned a[4];
            as_left(a, scores[i], scores[i + 1]);
            add_product<D, D / 8>(sums, a, keys_at + i * 8 * (D + 8));
        }
        __syncthreads();
        if (more) {
            copy_rows<D>(keys_at, saved.keys + next.row * stride + column, stride, KEYS, next.count, dim);
        }
        copies_begun();
        keys = next;
    }
#pragma unroll
    for (int i = 0; i < D / 2; i++) {
        int query = WARP * 16 + LANE / 4 + i % 4 / 2 * 8, channel = i / 4 * 8 + LANE % 4 * 2 + i % 2;
        if (query < count && channel < dim) {
            d_queries[at + query * width + channel] = scale * sums[i / 4][i % 4];
        }
    }
}

// Queries that a block takes at once, and how far the rows of their weights lie apart.
#define QUERIES 32
#define WEIGHTS (QUERIES + 8)

struct KeysScratch {
    bf16 weights[TILE_ROWS * WEIGHTS], d_scores[TILE_ROWS * WEIGHTS];
    // Of those that are computed with, and of those that come in.
    float log_sums[2][QUERIES], pulls[2][QUERIES];
};

// The keys of a block, as one of the spans that see them has them.
struct Reader {
    Span span;
    // The logical position of the first key, and which queries see one of them.
    int position, begin, end;

    __device__ Reader(const Span &span, bool own, int first, int count, int window)
        : span(span), position((own ? span.prefix_len : 0) + first) {
        int before = span.prefix_len + span.own_len - span.query_len;
        begin = max(position - before, 0);
        end = window > 0 ? min(position + count - 1 + window - before, span.query_len) : span.query_len;
    }
};

// The queries that see the keys of a block: one span after the other, some queries at a time, one head after the other.
struct Steps {
    const Span *spans;
    const int *readers;
    Tile tile;
    int count, window, first_head, last_head, index, end;
    Reader reader;
    int first, head;

    __device__ Steps(const Span *spans, const int *reader_start, const int *readers, const Tile &tile, int count,
                     const Shape &shape)
        : spans(spans), readers(readers), tile(tile), count(count), window(shape.window),
          first_head(blockIdx.y * shape.group()), last_head(first_head + shape.group() - 1),
          index(reader_start[tile.span]), end(reader_start[tile.span + 1]),
          reader(spans[tile.span], true, tile.first, count, shape.window), head(first_head) {
        begin_reader();
    }

    // The first queries of the next span that has any.
    __device__ void begin_reader() {
        for (first = 0; index < end; index++) {
            reader = Reader(spans[readers[index]], readers[index] == tile.span, tile.first, count, window);
            first = reader.begin / QUERIES * QUERIES;
            if (first < reader.end) {
                return;
            }
        }
    }

    __device__ bool there() const { return index < end; }

    __device__ void advance() {
        if (head < last_head) {
            head++;
            return;
        }
        head = first_head;
        first += QUERIES;
        if (first >= reader.end) {
            index++;
            begin_reader();
        }
    }
};

// Eight warps: 16 keys each, for half of the queries when there are weights to compute, then for half of the channels.
template <int D> struct KeysBackward {
    bf16 *keys, *values, *queries[2], *grads[2];
    KeysScratch *scratch;
    float d_keys[D / 16][4], d_values[D / 16][4];

    __device__ KeysBackward(unsigned char *shared) : d_keys{}, d_values{} {
        const int quarter = QUERIES * (D + 8);
        keys = (bf16 *)shared;
        values = keys + TILE_ROWS * (D + 8);
        for (int turn = 0; turn < 2; turn++) {
            queries[turn] = values + TILE_ROWS * (D + 8) + turn * 2 * quarter;
            grads[turn] = queries[turn] + quarter;
        }
        scratch = (KeysScratch *)(grads[1] + quarter);
    }

    __device__ int key_row() const { return WARP % 4 * 16; }
    __device__ int part() const { return WARP / 4; }

    // Begins to bring in some queries of one head.
    __device__ void load(const Saved &saved, const Shape &shape, const Steps &step, int turn) {
        int present = min(QUERIES, step.reader.span.query_len - step.first);
        long long row = step.reader.span.query_start + step.first, width = shape.query_width();
        long long at = row * width + step.head * shape.dim;
        copy_rows<D>(queries[turn], saved.queries + at, width, QUERIES, present, shape.dim);
        copy_rows<D>(grads[turn], saved.grad + at, width, QUERIES, present, shape.dim);
        if (threadIdx.x < QUERIES) {
            bool there = (int)threadIdx.x < present;
            long long of_row = (row + threadIdx.x) * shape.query_heads + step.head;
            scratch->log_sums[turn][threadIdx.x] = there ? saved.log_sums[of_row] : 0.0f;
            scratch->pulls[turn][threadIdx.x] = there ? saved.pulls[of_row] : 0.0f;
        }
    }

    // Weights [keys, queries] and the gradients of their scores.
    __device__ void weigh(const Shape &shape, const Reader &reader, int first, int turn) {
        float scores[2][4] = {}, d_weights[2][4] = {};
        int query_row = part() * 16;
        add_dots<D, 2>(scores, keys + key_row() * (D + 8), queries[turn] + query_row * (D + 8));
        add_dots<D, 2>(d_weights, values + key_row() * (D + 8), grads[turn] + query_row * (D + 8));
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
            int key = key_row() + LANE / 4 + i % 4 / 2 * 8, query = query_row + i / 4 * 8 + LANE % 4 * 2;
            Pair pairs[2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                // Rows behind the last key become anything, and are not written.
                bool sees = first + query + j < reader.span.query_len &&
                            visible(reader.span, first + query + j, shape.window).sees(reader.position + key);
                pairs[j] = score_gradient(scores[i / 4][i % 4 + j], d_weights[i / 4][i % 4 + j],
                                          scratch->log_sums[turn][query + j], scratch->pulls[turn][query + j],
                                          shape.soft_cap, sees);
            }
            int at = key * WEIGHTS + query;
            *(unsigned *)(scratch->weights + at) = round_pair(pairs[0].weight, pairs[1].weight);
            *(unsigned *)(scratch->d_scores + at) = round_pair(pairs[0].d_score, pairs[1].d_score);
        }
    }

    __device__ void add(int turn) {
#pragma unroll
        for (int query = 0; query < QUERIES; query += 16) {
            unsigned a[4];
            int rows = query * (D + 8) + part() * (D / 2);
            load_left<WEIGHTS>(a, scratch->weights + key_row() * WEIGHTS + query);
            add_product<D, D / 16>(d_values, a, grads[turn] + rows);
            load_left<WEIGHTS>(a, scratch->d_scores + key_row() * WEIGHTS + query);
            add_product<D, D / 16>(d_keys, a, queries[turn] + rows);
        }
    }
};

// While some queries are computed with, the next come in.
template <int D> __device__ void keys_backward(const Saved &saved, const Tile &tile, const Span *spans,
                                               const int *reader_start, const int *readers, float *d_keys,
                                               float *d_values, const Shape &shape) {
    DYNAMIC_SHARED(shared);
    require_shared(512 * (D + 8) + sizeof(KeysScratch));
    KeysBackward<D> block(shared);
    Span own = spans[tile.span];
    int count = min(TILE_ROWS, own.own_len - tile.first), dim = shape.dim;
    long long stride = shape.key_width(), column = (long long)blockIdx.y * dim,
              at = (own.own_start + tile.first) * stride + column;
    Steps step(spans, reader_start, readers, tile, count, shape);
    copy_rows<D>(block.keys, saved.keys + at, stride, TILE_ROWS, count, dim);
    copy_rows<D>(block.values, saved.values + at, stride, TILE_ROWS, count, dim);
    block.load(saved, shape, step, 0);
    copies_begun();
    for (int turn = 0; step.there(); turn ^= 1) {
        wait_for_copies<0>();
        __syncthreads();
        Reader reader = step.reader;
        int first = step.first;
        step.advance();
        if (step.there()) {
            block.load(saved, shape, step, turn ^ 1);
        }
        copies_begun();
        block.weigh(shape, reader, first, turn);
        __syncthreads();
        block.add(turn);
    }
    long long to = (own.query_start + tile.first) * stride + column;
#pragma unroll
    for (int i = 0; i < D / 4; i++) {
        int key = block.key_row() + LANE / 4 + i % 4 / 2 * 8,
            channel = block.part() * (D / 2) + i / 4 * 8 + LANE % 4 * 2 + i % 2;
        if (key < count && channel < dim) {
            d_keys[to + key * stride + channel] = block.d_keys[i / 4][i % 4];
            d_values[to + key * stride + channel] = block.d_values[i / 4][i % 4];
        }
    }
}

#define ATTENTION_BACKWARD(D)                                                                                        \
    extern "C" __global__ void __launch_bounds__(128) attention_backward_queries_##D(                                \
        const bf16 *queries_rounded, const bf16 *key_store, const bf16 *value_store, const bf16 *grad_rounded,       \
        const float *log_sums, const float *pulls, const Tile *tiles, const Span *spans, float *d_queries,           \
        int query_heads, int key_heads, int dim, float scale, float soft_cap, int window) {                          \
        Tile tile = tiles[blockIdx.x];                                                                               \
        Saved saved = {queries_rounded, key_store, value_store, grad_rounded, log_sums, pulls};                      \
        Shape shape = {query_heads, key_heads, dim, soft_cap, window};                                               \
        queries_backward<D>(saved, tile, spans[tile.span], d_queries, shape, scale);                                 \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(256, D <= 128 ? 2 : 1) attention_backward_keys_##D(                 \
        const bf16 *queries_rounded, const bf16 *key_store, const bf16 *value_store, const bf16 *grad_rounded,       \
        const float *log_sums, const float *pulls, const Tile *tiles, const Span *spans, const int *reader_start,    \
        const int *readers, float *d_keys, float *d_values, int query_heads, int key_heads, int dim, float soft_cap, \
        int window) {                                                                                                \
        Saved saved = {queries_rounded, key_store, value_store, grad_rounded, log_sums, pulls};                      \
        Shape shape = {query_heads, key_heads, dim, soft_cap, window};                                               \
        keys_backward<D>(saved, tiles[blockIdx.x], spans, reader_start, readers, d_keys, d_values, shape);           \
    }

ATTENTION_BACKWARD(64)
ATTENTION_BACKWARD(128)
ATTENTION_BACKWARD(256)
