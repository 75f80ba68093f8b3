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
//   choose(logits, rows, vocabulary, soft_cap, temperature, places, tokens, logprobs, untempered) (rows; 512)
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

// The most likely token of a row, the lowest id among equals; for every thread.
__device__ int most_likely(const float *logits, int vocabulary, float soft_cap) {
    float best = MINUS_INFINITY;
    for (int i = threadIdx.x; i < vocabulary; i += blockDim.x) {
        best = fmaxf(best, capped(logits[i], soft_cap));
    }
    best = block_reduce<Maximum>(best);
    int token = vocabulary;
    for (int i = threadIdx.x; i < vocabulary && token == vocabulary; i += blockDim.x) {
        token = capped(logits[i], soft_cap) == best ? i : token;
    }
    // The lowest id is the largest of the negated ones. Where nothing equals the maximum, the row is NaN.
    return min(-block_reduce<Maximum>(-token), vocabulary - 1);
}

// A row's distribution.
struct Distribution {
    const float *logits;
    int vocabulary;
    float soft_cap, inverse_temperature, log_sum;
    __device__ float logit(int token) const { return inverse_temperature * capped(logits[token], soft_cap); }
    __device__ float probability(int token) const { return expf(logit(token) - log_sum); }
};

// The probability of the stretch of tokens from `start` on, for every lane of a warp.
__device__ double stretch_probability(const Distribution &row, int start, int length) {
    int end = min(start + length, row.vocabulary);
    float sum = 0.0f;
    for (int i = start + LANE; i < end; i += LANES) {
        sum += row.probability(i);
    }
    return warp_reduce<Sum>((double)sum);
}

// Groups of stretches of tokens that a vocabulary is cut into; so many numbers are at most walked over one by one.
#define GROUPS 32
#define MOST 1024

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
__device__ int inverse_cumulative(const Distribution &row, double place) {
    __shared__ double stretches[MOST], groups[GROUPS], tokens[MOST];
    __shared__ int found;
    int length = ((row.vocabulary + MOST - 1) / MOST + LANES - 1) / LANES * LANES;
    for (int i = WARP; i < MOST; i += blockDim.x / LANES) {
        double probability = stretch_probability(row, i * length, length);
        if (LANE == 0) {
            stretches[i] = probability;
        }
    }
    __syncthreads();
    if (threadIdx.x < GROUPS) {
        double sum = 0.0;
        for (int i = 0; i < MOST / GROUPS; i++) {
            sum += stretches[threadIdx.x * (MOST / GROUPS) + i];
        }
        groups[threadIdx.x] = sum;
    }
    __syncthreads();
    Place at = {0.0, place};
    if (threadIdx.x == 0) {
        int group = at.find(groups, GROUPS) * (MOST / GROUPS);
        found = (group + at.find(stretches + group, MOST / GROUPS)) * length;
    }
    __syncthreads();
    int start = found, count = min(length, row.vocabulary - start);
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        tokens[i] = row.probability(start + i);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        found = start + at.find(tokens, count);
    }
    __syncthreads();
    return found;
}

extern "C" __global__ void choose(const float *logits, int rows, int vocabulary, float soft_cap, float temperature,
                                  const double *places, unsigned *tokens, float *logprobs, float *untempered) {
    const float *own = logits + (long long)blockIdx.x * vocabulary;
    double place = places[blockIdx.x];
    float plain_sum = tally_of(logits, vocabulary, soft_cap, 1.0f).log_sum();
    Distribution row = {own, vocabulary, soft_cap, 1.0f, plain_sum};
    int token;
    if (place < 0.0) {
        token = most_likely(own, vocabulary, soft_cap);
    } else {
        if (temperature != 1.0f) {
            row.inverse_temperature = 1.0f / temperature;
            row.log_sum = tally_of(logits, vocabulary, soft_cap, row.inverse_temperature).log_sum();
        }
        token = inverse_cumulative(row, place);
    }
    if (threadIdx.x == 0) {
        tokens[blockIdx.x] = (unsigned)token;
        logprobs[blockIdx.x] = row.logit(token) - row.log_sum;
        untempered[blockIdx.x] = capped(own[token], soft_cap) - plain_sum;
    }
}
