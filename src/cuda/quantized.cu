// Frozen weights that stay packed, unpacked to bf16 for the products of one layer at a time; the twin of
// ops/quantized.rs and ops/nf4.rs. Values are computed in f32 and rounded once.
//
//   unpack_nf4(codes, scales, nested, offset, code_values, scale_values, out, n) (spread over n; 256)
//       The parts of an Nf4, and what its 16 codes and the 256 codes of its scales stand for (nf4::tables).
//   unpack_q4_0, unpack_q4_1, unpack_q5_0, unpack_q5_1, unpack_q8_0, unpack_q2_k, unpack_q3_k, unpack_q4_k,
//           unpack_q5_k,
//   unpack_q6_k(blocks, out, n) (spread over n; 256)
//       GGUF's blocks as they lie in a file (ggml's ggml-quants.c); n is a whole number of blocks.

#define NF4_BLOCK 64
#define NF4_NESTED 256

extern "C" __global__ void unpack_nf4(const unsigned char *codes, const unsigned char *scales, const float *nested,
                                      float offset, const float *code_values, const float *scale_values, bf16 *out,
                                      long long n) {
    for (long long i = FIRST; i < n; i += STRIDE) {
        long long block = i / NF4_BLOCK;
        float scale = scale_values[scales[block]] * nested[block / NF4_NESTED] + offset;
        unsigned code = i % 2 == 0 ? codes[i / 2] >> 4 : codes[i / 2] & 15;
        out[i] = round_bf16(code_values[code] * scale);
    }
}

// IEEE half precision, which lies at any address.
__device__ float half_at(const unsigned char *bytes) {
    unsigned bits = bytes[0] | (unsigned)bytes[1] << 8;
    unsigned sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31u, mantissa = bits & 1023u;
    if (exponent == 31u) {
        return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
    }
    if (exponent > 0u) {
        return __uint_as_float(sign | (exponent + 112u) << 23 | mantissa << 13);
    }
    float small = (float)mantissa * 5.9604644775390625e-8f; // 2^-24
    return sign ? -small : small;
}

// Blocks of 32 values: the low nibbles are the first 16, the high nibbles the others.
__device__ int nibble(const unsigned char *codes, int i) {
    return i < 16 ? codes[i] & 15 : codes[i - 16] >> 4;
}

// The fifth bits of 32 values.
__device__ int fifth(const unsigned char *bits, int i) {
    return (bits[i / 8] >> i % 8 & 1) << 4;
}

struct Q4_0 {
    enum { VALUES = 32, BYTES = 18 };
    __device__ static float value(const unsigned char *block, int i) {
        return half_at(block) * (nibble(block + 2, i) - 8);
    }
};

struct Q4_1 {
    enum { VALUES = 32, BYTES = 20 };
    __device__ static float value(const unsigned char *block, int i) {
        return half_at(block) * nibble(block + 4, i) + half_at(block + 2);
    }
};

struct Q5_0 {
    enum { VALUES = 32, BYTES = 22 };
    __device__ static float value(const unsigned char *block, int i) {
        return half_at(block) * ((nibble(block + 6, i) | fifth(block + 2, i)) - 16);
    }
};

struct Q5_1 {
    enum { VALUES = 32, BYTES = 24 };
    __device__ static float value(const unsigned char *block, int i) {
        return half_at(block) * (nibble(block + 8, i) | fifth(block + 4, i)) + half_at(block + 2);
    }
};

struct Q8_0 {
    enum { VALUES = 32, BYTES = 34 };
    __device__ static float value(const unsigned char *block, int i) {
        return half_at(block) * (signed char)block[2 + i];
    }
};

// Blocks of 256 values in 16 groups of 16 or 8 of 32; two bits of four stretches of 32 values share a byte.
__device__ int two_bits(const unsigned char *codes, int i) {
    return codes[i / 128 * 32 + i % 32] >> i % 128 / 32 * 2 & 3;
}

struct Q2_K {
    enum { VALUES = 256, BYTES = 84 };
    __device__ static float value(const unsigned char *block, int i) {
        int scale = block[i / 16];
        return half_at(block + 80) * (scale & 15) * two_bits(block + 16, i) - half_at(block + 82) * (scale >> 4);
    }
};

struct Q3_K {
    enum { VALUES = 256, BYTES = 110 };
    __device__ static float value(const unsigned char *block, int i) {
        const unsigned char *scales = block + 96;
        int group = i / 16, low = group < 8 ? scales[group] & 15 : scales[group - 8] >> 4;
        int scale = (low | (scales[8 + group % 4] >> group / 4 * 2 & 3) << 4) - 32;
        int code = two_bits(block + 32, i) - (block[i % 32] >> i / 32 & 1 ? 0 : 4);
        return half_at(block + 108) * scale * code;
    }
};

// Six bits each of the scale and the minimum of group number i of 8.
__device__ int scale_of_8(const unsigned char *scales, int i) {
    return i < 4 ? scales[i] & 63 : (scales[i + 4] & 15) | scales[i - 4] >> 6 << 4;
}

__device__ int minimum_of_8(const unsigned char *scales, int i) {
    return i < 4 ? scales[i + 4] & 63 : scales[i + 4] >> 4 | scales[i] >> 6 << 4;
}

// A byte's low nibble belongs to the first 32 of 64 values, its high nibble to the others.
__device__ int nibble_of_64(const unsigned char *codes, int i) {
    int byte = codes[i / 64 * 32 + i % 32];
    return i % 64 < 32 ? byte & 15 : byte >> 4;
}

struct Q4_K {
    enum { VALUES = 256, BYTES = 144 };
    __device__ static float value(const unsigned char *block, int i) {
        float scale = half_at(block) * scale_of_8(block + 4, i / 32),
              minimum = half_at(block + 2) * minimum_of_8(block + 4, i / 32);
        return scale * nibble_of_64(block + 16, i) - minimum;
    }
};

struct Q5_K {
    enum { VALUES = 256, BYTES = 176 };
    __device__ static float value(const unsigned char *block, int i) {
        float scale = half_at(block) * scale_of_8(block + 4, i / 32),
              minimum = half_at(block + 2) * minimum_of_8(block + 4, i / 32);
        int high = (block[16 + i % 32] >> i / 32 & 1) << 4;
        return scale * (nibble_of_64(block + 48, i) | high) - minimum;
    }
};

struct Q6_K {
    enum { VALUES = 256, BYTES = 210 };
    __device__ static float value(const unsigned char *block, int i) {
        int half = i / 128, within = i % 128;
        int byte = block[half * 64 + within % 64];
        int low = within < 64 ? byte & 15 : byte >> 4, high = two_bits(block + 128, i) << 4;
        return half_at(block + 208) * (signed char)block[192 + i / 16] * ((low | high) - 32);
    }
};

template <typename Format> __device__ void unpack(const unsigned char *blocks, bf16 *out, long long n) {
    for (long long i = FIRST; i < n; i += STRIDE) {
        out[i] = round_bf16(Format::value(blocks + i / Format::VALUES * Format::BYTES, (int)(i % Format::VALUES)));
    }
}

#define UNPACK(name, Format)                                                               \
    extern "C" __global__ void name(const unsigned char *blocks, bf16 *out, long long n) { \
        unpack<Format>(blocks, out, n);                                                    \
    }

UNPACK(unpack_q4_0, Q4_0)
UNPACK(unpack_q4_1, Q4_1)
UNPACK(unpack_q5_0, Q5_0)
UNPACK(unpack_q5_1, Q5_1)
UNPACK(unpack_q8_0, Q8_0)
UNPACK(unpack_q2_k, Q2_K)
UNPACK(unpack_q3_k, Q3_K)
UNPACK(unpack_q4_k, Q4_K)
UNPACK(unpack_q5_k, Q5_K)
UNPACK(unpack_q6_k, Q6_K)
