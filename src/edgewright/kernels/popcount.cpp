// A linear layer of signs: inputs become bits, 64 products are one logic operation and a count of ones.
//
// Weight bits lie in tiles of LANES outputs: tiles[out / LANES][words][LANES], so that neighbouring outputs share a
// vector register and an input word is broadcast against them. Unused bits of the last word are 0 on both sides.
//   signs x signs      n - 2 * ones(a xor w)
//   {0, 1} x signs     2 * ones(a and w) - ones(a)

#include <algorithm>
#include <cstdint>
#include <functional>
#include <new>
#include <thread>
#include <vector>

#if defined(__AVX2__) && !defined(EDGEWRIGHT_PORTABLE)
#include <immintrin.h>
#define USE_AVX2 1
#endif

namespace {

constexpr int64_t LANES = 8;   // popcount.py lays the weights out for this number
constexpr int64_t CHUNK = 31;  // words whose counts (at most 8 a byte) fit into bytes

struct Layer {
    const uint64_t* bits;  // [rows, words]
    const uint64_t* tiles;
    const int32_t* ones;  // [rows], ones in each input row; only for {0, 1}
    const float* scale;   // [out]
    const float* bias;    // [out] or null
    float* y;             // [rows, out]
    int64_t rows, n, words, out;
};

inline bool bit_of(float x, float alpha, bool is_signed) {
    const float value = x / alpha;
    return is_signed ? value >= 0.0f : value > 0.5f;  // ties round to even, so one half is 0
}

void pack_row(const float* x, const float* shift, float alpha, bool is_signed, int64_t n, uint64_t* words) {
    int64_t i = 0;
    std::fill(words, words + (n + 63) / 64, 0);
#ifdef USE_AVX2
    const __m256 scale = _mm256_set1_ps(alpha), zero = _mm256_setzero_ps(), half = _mm256_set1_ps(0.5f);
    for (; i + 8 <= n; i += 8) {
        __m256 v = _mm256_loadu_ps(x + i);
        if (shift) v = _mm256_add_ps(v, _mm256_loadu_ps(shift + i));
        v = _mm256_div_ps(v, scale);
        const __m256 hit = is_signed ? _mm256_cmp_ps(v, zero, _CMP_GE_OQ) : _mm256_cmp_ps(v, half, _CMP_GT_OQ);
        words[i >> 6] |= static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_ps(hit))) << (i & 63);
    }
#endif
    for (; i < n; ++i)
        words[i >> 6] |= static_cast<uint64_t>(bit_of(shift ? x[i] + shift[i] : x[i], alpha, is_signed)) << (i & 63);
}

template <bool SIGNED>
inline void store(const Layer& l, int64_t row, int64_t tile, const int64_t* counts) {
    const int64_t first = tile * LANES, last = std::min(first + LANES, l.out);
    for (int64_t o = first; o < last; ++o) {
        const int64_t count = counts[o - first];
        const int64_t dot = SIGNED ? l.n - 2 * count : 2 * count - l.ones[row];
        const float value = static_cast<float>(dot) * l.scale[o];
        l.y[row * l.out + o] = l.bias ? value + l.bias[o] : value;
    }
}

#ifdef USE_AVX2
inline __m256i byte_counts(__m256i v, __m256i table, __m256i nibble) {
    const __m256i low = _mm256_shuffle_epi8(table, _mm256_and_si256(v, nibble));
    const __m256i high = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi32(v, 4), nibble));
    return _mm256_add_epi8(low, high);
}

template <bool SIGNED, int ROWS>
void block(const Layer& l, int64_t row, int64_t tile) {
    const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,
                                           0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
    const __m256i nibble = _mm256_set1_epi8(15), zero = _mm256_setzero_si256();
    const uint64_t* weights = l.tiles + tile * l.words * LANES;
    __m256i total[ROWS][2];
    for (int r = 0; r < ROWS; ++r) total[r][0] = total[r][1] = zero;
    for (int64_t begin = 0; begin < l.words; begin += CHUNK) {
        const int64_t end = std::min(begin + CHUNK, l.words);
        __m256i bytes[ROWS][2];
        for (int r = 0; r < ROWS; ++r) bytes[r][0] = bytes[r][1] = zero;
        for (int64_t k = begin; k < end; ++k) {
            const __m256i w0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights + k * LANES));
            const __m256i w1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights + k * LANES + 4));
            for (int r = 0; r < ROWS; ++r) {
                const __m256i a = _mm256_set1_epi64x(static_cast<int64_t>(l.bits[(row + r) * l.words + k]));
                const __m256i v0 = SIGNED ? _mm256_xor_si256(a, w0) : _mm256_and_si256(a, w0);
                const __m256i v1 = SIGNED ? _mm256_xor_si256(a, w1) : _mm256_and_si256(a, w1);
                bytes[r][0] = _mm256_add_epi8(bytes[r][0], byte_counts(v0, table, nibble));
                bytes[r][1] = _mm256_add_epi8(bytes[r][1], byte_counts(v1, table, nibble));
            }
        }
        for (int r = 0; r < ROWS; ++r)
            for (int h = 0; h < 2; ++h) total[r][h] = _mm256_add_epi64(total[r][h], _mm256_sad_epu8(bytes[r][h], zero));
    }
    for (int r = 0; r < ROWS; ++r) {
        alignas(32) int64_t counts[LANES];
        _mm256_store_si256(reinterpret_cast<__m256i*>(counts), total[r][0]);
        _mm256_store_si256(reinterpret_cast<__m256i*>(counts + 4), total[r][1]);
        store<SIGNED>(l, row + r, tile, counts);
    }
}
#else
template <bool SIGNED, int ROWS>
void block(const Layer& l, int64_t row, int64_t tile) {
    const uint64_t* weights = l.tiles + tile * l.words * LANES;
    for (int r = 0; r < ROWS; ++r) {
        int64_t counts[LANES] = {};
        for (int64_t k = 0; k < l.words; ++k) {
            const uint64_t a = l.bits[(row + r) * l.words + k];
            for (int64_t j = 0; j < LANES; ++j) {  // compilers turn this into vector counts where the CPU has them
                const uint64_t w = weights[k * LANES + j];
                counts[j] += __builtin_popcountll(SIGNED ? a ^ w : a & w);
            }
        }
        store<SIGNED>(l, row + r, tile, counts);
    }
}
#endif

template <bool SIGNED>
void tiles_between(const Layer& l, int64_t first, int64_t last) {
    for (int64_t tile = first; tile < last; ++tile) {
        int64_t row = 0;
        for (; row + 4 <= l.rows; row += 4) block<SIGNED, 4>(l, row, tile);
        for (; row < l.rows; ++row) block<SIGNED, 1>(l, row, tile);
    }
}

void part(const Layer& l, bool is_signed, int64_t first, int64_t last) {
    is_signed ? tiles_between<true>(l, first, last) : tiles_between<false>(l, first, last);
}

}  // namespace

// x [rows, n] float32, shift [n] or null, tiles as above, scale and bias [out] -> y [rows, out]. Returns 0, or 1 where
// memory ran out (y is then undefined).
extern "C" int32_t edgewright_binary_linear(const float* x, const float* shift, float alpha, int32_t is_signed,
                                            const uint64_t* tiles, const float* scale, const float* bias, float* y,
                                            int64_t rows, int64_t n, int64_t out, int32_t threads) {
    try {
        const int64_t words = (n + 63) / 64, tile_count = (out + LANES - 1) / LANES;
        std::vector<uint64_t> bits(static_cast<size_t>(rows * words));
        std::vector<int32_t> ones(is_signed ? 0 : static_cast<size_t>(rows));
        for (int64_t r = 0; r < rows; ++r) {
            pack_row(x + r * n, shift, alpha, is_signed != 0, n, bits.data() + r * words);
            if (!is_signed)
                for (int64_t k = 0; k < words; ++k) ones[r] += __builtin_popcountll(bits[r * words + k]);
        }
        const Layer layer{bits.data(), tiles, ones.data(), scale, bias, y, rows, n, words, out};
        const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, tile_count));
        std::vector<std::thread> helpers;
        int64_t begun = 0;
        try {
            for (; begun + 1 < parts; ++begun)
                helpers.emplace_back(part, std::cref(layer), is_signed != 0, tile_count * begun / parts,
                                     tile_count * (begun + 1) / parts);
        } catch (...) {  // no more threads: the rest is done here
        }
        part(layer, is_signed != 0, tile_count * begun / parts, tile_count);
        for (auto& helper : helpers) helper.join();
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}
