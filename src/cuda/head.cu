// From logits to log-probabilities, their gradient and the choice of a token; the twin of ops/head.rs.
//
// Logits are what the head's weight makes of hidden states, before soft-cap and temperature: raw. With cap c (0 = none)
// and temperature t, z = c * tanh(raw / c) / t.
//
//   tally(logits, rows, first_token, tokens, soft_cap, inverse_temperature, targets, max, sum, weighted, chosen) (rows;
//           256)
//       One chunk of the vocabulary, logits [rows, tokens]; chunks come in order, and the one with first_token 0 begins
//       anew. Per row: max m of z, sum of exp(z - m), sum of exp(z - m) * (z - m), and z of the target once it was
//       seen. sum and weighted are double.
//   tally_end(max, sum, weighted, chosen, logprobs, entropies, log_sums, rows) (ceil(rows / 256); 256)
//       logprobs = log p(target), entropies in nats, log_sums = log of the sum of exp(z): [rows] each.
//   logit_gradient(logits, rounded, rows, first_token, tokens, soft_cap, temperature, targets, log_sums, grad) (rows;
//           256)
//       The gradient of the raw logits, in bf16 [rows, tokens], given that of the log-probabilities [rows].
//   choose_stretches(logits, rows, vocabulary, soft_cap, temperature, stretches) (rows, any number, say vocabulary / 2048
//           + 1; 256)
//       What `choose` begins with, by many blocks: stretches [rows, 3, 1024].
//   choose(logits, stretches, rows, vocabulary, soft_cap, temperature, places, tokens, logprobs, untempered) (rows; 256)
//       All logits of a row at once, up to 2^20 tokens. place < 0: the most likely token, the lowest id among equals;
//       else the first token at which the cumulative distribution over token ids exceeds the place. The log-probability
//       is that of the tempered softmax, untempered that at temperature 1. Where a row's sums are not finite, one of
//       them is NaN or infinite: the host looks at them. There is no Gumbel noise: a token's place is a number of the
//       host's counters, so that the device draws what the CPU draws.

// Caps a raw logit.
__device__ __forceinline__ float capped(float raw, float soft_cap) {
    return soft_cap > 0.0f ? soft_cap - 2.0f * soft_cap / (1.0f + expf(2.0f / soft_cap * raw)) : raw;
}

// Maximum m, sum of exp(z - m), and of exp(z - m) * (z - m).
struct Tally {
    float max;
    double sum, weighted;
    __device__ float log_sum() const { return (float)((double)max + log(sum)); }
};

// What two parts of a row come to together.
__device__ Tally together(Tally a, Tally b) {
    if (a.sum == 0.0 || b.sum == 0.0) {
        return a.sum == 0.0 ? b : a;
    }
    float max = Maximum::of(a.max, b.max);
    double shift_a = (double)a.max - max, shift_b = (double)b.max - max;
    double scale_a = exp(shift_a), scale_b = exp(shift_b);
    return {max, a.sum * scale_a + b.sum * scale_b,
            (a.weighted + a.sum * shift_a) * scale_a + (b.weighted + b.sum * shift_b) * scale_b};
}

// A thread's own part of a row, from one maximum to the next.
struct RunningTally {
    const float *logits;
    float soft_cap, inverse_temperature;
    float max, sum, weighted;

    template <int N> __device__ void at(long long i) {
        Floats<N> raw = load<N>(logits + i);
#pragma unroll
        for (int j = 0; j < N; j++) {
            add(inverse_temperature * capped(raw.at[j], soft_cap));
        }
    }

    __device__ void add(float z) {
        if (z > max) {
            if (max > MINUS_INFINITY) {
                float shift = max - z, scale = expf(shift);
                weighted = (weighted + sum * shift) * scale;
                sum *= scale;
            }
            max = z;
        }
        // What cannot be has no share; what is no number makes the sums none.
        if (z != MINUS_INFINITY) {
            float below = z - max, e = expf(below);
            sum += e;
            weighted += e * below;
        }
    }
};

// Of the block's row of logits, for every thread.
__device__ Tally tally_of(const float *logits, int tokens, float soft_cap, float inverse_temperature) {
    const float *row = logits + (long long)blockIdx.x * tokens;
    RunningTally own = {row, soft_cap, inverse_temperature, MINUS_INFINITY, 0.0f, 0.0f};
    in_fours(threadIdx.x, blockDim.x, tokens, place(logits, tokens), own);
    float max = block_reduce<Maximum>(own.max);
    double shift = own.sum == 0.0f ? 0.0 : (double)own.max - (double)max, scale = exp(shift);
    double sum = block_reduce<Sum>((double)own.sum * scale);
    return {max, sum, block_reduce<Sum>(((double)own.weighted + (double)own.sum * shift) * scale)};
}

extern "C" __global__ void tally(const float *logits, int rows, int first_token, int tokens, float soft_cap,
                                 float inverse_temperature, const unsigned *targets, float *max, double *sum,
                                 double *weighted, float *chosen) {
    int row = blockIdx.x;
    const float *own = logits + (long long)row * tokens;
    Tally total = tally_of(logits, tokens, soft_cap, inverse_temperature);
    if (threadIdx.x == 0) {
        if (first_token > 0) {
            Tally before = {max[row], sum[row], weighted[row]};
            total = together(before, total);
        }
        max[row] = total.max;
        sum[row] = total.sum;
        weighted[row] = total.weighted;
        long long target = (long long)targets[row] - first_token;
        if (target >= 0 && target < tokens) {
            chosen[row] = inverse_temperature * capped(own[target], soft_cap);
        }
    }
}

extern "C" __global__ void tally_end(const float *max, const double *sum, const double *weighted, const float *chosen,
                                     float *logprobs, float *entropies, float *log_sums, int rows) {
    int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row < rows) {
        Tally total = {max[row], sum[row], weighted[row]};
        log_sums[row] = total.log_sum();
        logprobs[row] = chosen[row] - total.log_sum();
        entropies[row] = (float)(log(total.sum) - total.weighted / total.sum);
    }
}

// Of the raw logits of a row.
struct LogitGradient {
    const float *logits;
    bf16 *to;
    long long target;
    float soft_cap, inverse_temperature, log_sum, scale;
    template <int N> __device__ void at(long long i) {
        Floats<N> values = load<N>(logits + i);
#pragma unroll
        for (int j = 0; j < N; j++) {
            float z = capped(values.at[j], soft_cap), ratio = soft_cap > 0.0f ? z / soft_cap : 0.0f;
            float off = (i + j == target ? 1.0f : 0.0f) - expf(inverse_temperature * z - log_sum);
            values.at[j] = scale * off * (1.0f - ratio * ratio);
        }
        store(to + i, rounded(values));
    }
};

extern "C" __global__ void logit_gradient(const float *logits, bf16 *rounded, int rows, int first_token, int tokens,
                                          float soft_cap, float temperature, const unsigned *targets,
                                          const float *log_sums, const float *grad) {
    long long row = blockIdx.x, target = (long long)targets[row] - first_token;
    const float *from = logits + row * tokens;
    bf16 *to = rounded + row * tokens;
    LogitGradient body = {from, to, target, soft_cap, 1.0f / temperature, log_sums[row], grad[row] / temperature};
    in_fours(threadIdx.x, blockDim.x, tokens, place(from) | place(to), body);
}

// Stretches of tokens that a vocabulary is cut into, so that many blocks work on one row, and groups of them. So many
// numbers are at most walked over one by one.
#define STRETCHES 1024
#define GROUPS 32
// Tokens that a warp takes at once.
#define AT_ONCE (8 * LANES)

__device__ __forceinline__ int stretch_length(int vocabulary) {
    return ((vocabulary + STRETCHES - 1) / STRETCHES + LANES - 1) / LANES * LANES;
}

// Maximum m of capped logits, sum of exp(z - m), and the same with both divided by the temperature.
struct Stretch {
    float max, plain, tempered;
};

// Of some logits, for every lane of a warp.
__device__ Stretch stretch_of(const float *logits, int count, float soft_cap, float inverse_temperature) {
    Stretch total = {MINUS_INFINITY, 0.0f, 0.0f};
    for (int start = 0; start < count; start += AT_ONCE) {
        float z[AT_ONCE / LANES], max = total.max, plain = 0.0f, tempered = 0.0f;
#pragma unroll
        for (int j = 0; j < AT_ONCE / LANES; j++) {
            int i = start + j * LANES + LANE;
            z[j] = i < count ? capped(logits[i], soft_cap) : MINUS_INFINITY;
            max = fmaxf(max, z[j]);
        }
        max = warp_reduce<Maximum>(max);
#pragma unroll
        for (int j = 0; j < AT_ONCE / LANES; j++) {
            bool there = z[j] != MINUS_INFINITY;
            plain += there ? expf(z[j] - max) : 0.0f;
            tempered += there ? expf(inverse_temperature * (z[j] - max)) : 0.0f;
        }
        float shift = total.plain == 0.0f ? 0.0f : total.max - max;
        total.plain = total.plain * expf(shift) + warp_reduce<Sum>(plain);
        total.tempered = total.tempered * expf(inverse_temperature * shift) + warp_reduce<Sum>(tempered);
        total.max = max;
    }
    return total;
}

extern "C" __global__ void choose_stretches(const float *logits, int rows, int vocabulary, float soft_cap,
                                            float temperature, float *stretches) {
    int length = stretch_length(vocabulary), warps = blockDim.x / LANES;
    const float *row = logits + (long long)blockIdx.x * vocabulary;
    float *to = stretches + (long long)blockIdx.x * 3 * STRETCHES;
    for (int i = blockIdx.y * warps + WARP; i < STRETCHES; i += gridDim.y * warps) {
        int count = min(length, vocabulary - i * length);
        Stretch own = stretch_of(row + (long long)i * length, count, soft_cap, 1.0f / temperature);
        if (LANE == 0) {
            to[i] = own.max;
            to[STRETCHES + i] = own.plain;
            to[2 * STRETCHES + i] = own.tempered;
        }
    }
}

// A row's distribution.
struct Distribution {
    const float *logits;
    int vocabulary;
    float soft_cap, inverse_temperature, log_sum;
    __device__ float logit(int token) const { return inverse_temperature * capped(logits[token], soft_cap); }
};

// The most likely token of a row, the lowest id among equals; for every thread. Where nothing equals the maximum, the row
// is no numbers.
__device__ int most_likely(const Distribution &row, const float *maxima, float max) {
    int first = STRETCHES - 1, length = stretch_length(row.vocabulary);
    for (int i = threadIdx.x; i < STRETCHES; i += blockDim.x) {
        first = maxima[i] == max ? min(first, i) : first;
    }
    int start = min(-block_reduce<Maximum>(-first) * length, row.vocabulary - 1), token = row.vocabulary - 1;
    for (int i = start + threadIdx.x; i < min(start + length, row.vocabulary); i += blockDim.x) {
        token = row.logit(i) == max ? min(token, i) : token;
    }
    return -block_reduce<Maximum>(-token);
}

// The first of some probabilities with which a cumulative distribution exceeds a place.
struct Place {
    double before, place;

    // Where there is none, rounding left the total a little below the place: then it is the last that can be.
    __device__ int find(const double *probabilities, int count) {
        int last = 0;
        for (int i = 0; i < count; i++) {
            if (before + probabilities[i] > place) {
                return i;
            }
            last = probabilities[i] > 0.0 ? i : last;
            before += probabilities[i];
        }
        place = __longlong_as_double(0x7ff0000000000000ll);
        return last;
    }
};

// The first token at which the cumulative probability exceeds the place: its group, its stretch there, and itself.
__device__ int inverse_cumulative(const Distribution &row, const float *maxima, const float *sums, double place) {
    __shared__ double stretches[STRETCHES], groups[GROUPS], tokens[STRETCHES];
    __shared__ int found;
    const int of_group = STRETCHES / GROUPS;
    int length = stretch_length(row.vocabulary);
    for (int i = threadIdx.x; i < STRETCHES; i += blockDim.x) {
        double highest = exp((double)(row.inverse_temperature * maxima[i] - row.log_sum));
        stretches[i] = sums[i] == 0.0f ? 0.0 : sums[i] * highest;
    }
    __syncthreads();
    if (threadIdx.x < GROUPS) {
        double sum = 0.0;
        for (int i = 0; i < of_group; i++) {
            sum += stretches[threadIdx.x * of_group + i];
        }
        groups[threadIdx.x] = sum;
    }
    __syncthreads();
    Place at = {0.0, place};
    if (threadIdx.x == 0) {
        int group = at.find(groups, GROUPS) * of_group;
        found = (group + at.find(stretches + group, of_group)) * length;
    }
    __syncthreads();
    int start = found, count = min(length, row.vocabulary - start);
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        tokens[i] = expf(row.logit(start + i) - row.log_sum);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        found = start + at.find(tokens, count);
    }
    __syncthreads();
    return found;
}

// The log of the sum of exponentials of a row, from those of its stretches; for every thread.
__device__ float log_sum_of(const float *maxima, const float *sums, float max, float inverse_temperature) {
    double sum = 0.0;
    for (int i = threadIdx.x; i < STRETCHES; i += blockDim.x) {
        sum += sums[i] == 0.0f ? 0.0 : sums[i] * exp((double)inverse_temperature * ((double)maxima[i] - (double)max));
    }
    return (float)((double)inverse_temperature * (double)max + log(block_reduce<Sum>(sum)));
}

extern "C" __global__ void choose(const float *logits, const float *stretches, int rows, int vocabulary, float soft_cap,
                                  float temperature, const double *places, unsigned *tokens, float *logprobs,
                                  float *untempered) {
    const float *maxima = stretches + (long long)blockIdx.x * 3 * STRETCHES, *plain = maxima + STRETCHES;
    const float *tempered = plain + STRETCHES;
    float max = MINUS_INFINITY;
    for (int i = threadIdx.x; i < STRETCHES; i += blockDim.x) {
        max = fmaxf(max, maxima[i]);
    }
    max = block_reduce<Maximum>(max);
    float plain_sum = log_sum_of(maxima, plain, max, 1.0f);
    Distribution row = {logits + (long long)blockIdx.x * vocabulary, vocabulary, soft_cap, 1.0f, plain_sum};
    double place = places[blockIdx.x];
    int token;
    if (place < 0.0) {
        token = most_likely(row, maxima, max);
    } else {
        row.inverse_temperature = 1.0f / temperature;
        row.log_sum = log_sum_of(maxima, tempered, max, row.inverse_temperature);
        token = inverse_cumulative(row, maxima, tempered, place);
    }
    if (threadIdx.x == 0) {
        tokens[blockIdx.x] = (unsigned)token;
        logprobs[blockIdx.x] = row.logit(token) - row.log_sum;
        untempered[blockIdx.x] = capped(row.logits[token], soft_cap) - plain_sum;
    }
}
