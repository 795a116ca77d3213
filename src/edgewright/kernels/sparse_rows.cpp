// A matrix-vector product that reads only some rows of a matrix, and a low-rank product for the rest.
//
// Weights lie transposed, one contiguous row of `out` numbers an input channel, so that a channel that is left out costs
// nothing. Every output is a plain sum in the order of the channels, whatever the tile, the vector width or the number
// of threads: results are the same bits everywhere.
//   y = bias + sum over kept i of x_i W[i, :] + sum over j of z_j up[j, :],   z = sum over other i of x_i down[i, :]

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <new>
#include <thread>
#include <vector>

namespace {

constexpr int64_t TILE = 4096;  // outputs at work at once: their sums stay in the cache, a row is still a long read
constexpr int64_t SMALLEST_PART = 64;
constexpr int ROWS = 8;

enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, CODES = 2 };

struct BFloat16 {
    uint16_t bits;
};

inline float to_float(float v) { return v; }
inline float to_float(int8_t v) { return static_cast<float>(v); }
inline float to_float(BFloat16 v) {
    const uint32_t wide = static_cast<uint32_t>(v.bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

struct Chosen {  // some channels and their inputs
    std::vector<int64_t> index;
    std::vector<float> value;
    void reserve(int64_t n) { index.reserve(n), value.reserve(n); }
    void add(int64_t i, float v) { index.push_back(i), value.push_back(v); }
    int64_t size() const { return static_cast<int64_t>(index.size()); }
};

// y[0 .. width) += sum over rows [first, last) of `chosen` of value * matrix[index, begin .. begin + width)
template <typename T>
void add_rows(const Chosen& chosen, int64_t first, int64_t last, const T* matrix, int64_t stride, int64_t begin,
              int64_t width, float* __restrict y) {
    int64_t k = first;
    for (; k + ROWS <= last; k += ROWS) {  // several rows a pass: the sums are loaded and stored that much less often
        const T* r[ROWS];
        float v[ROWS];
        for (int j = 0; j < ROWS; ++j) {
            r[j] = matrix + chosen.index[k + j] * stride + begin;
            v[j] = chosen.value[k + j];
        }
        for (int64_t o = 0; o < width; ++o) {
            float sum = y[o];
            for (int j = 0; j < ROWS; ++j) sum += v[j] * to_float(r[j][o]);
            y[o] = sum;
        }
    }
    for (; k < last; ++k) {
        const T* row = matrix + chosen.index[k] * stride + begin;
        const float v = chosen.value[k];
        for (int64_t o = 0; o < width; ++o) y[o] += v * to_float(row[o]);
    }
}

void add_kind(int32_t kind, const Chosen& chosen, const void* matrix, int64_t stride, int64_t begin, int64_t width,
              float* y) {
    if (kind == BFLOAT16)
        add_rows(chosen, 0, chosen.size(), static_cast<const BFloat16*>(matrix), stride, begin, width, y);
    else
        add_rows(chosen, 0, chosen.size(), static_cast<const float*>(matrix), stride, begin, width, y);
}

struct Product {
    const void* weight;  // [n, out]
    int32_t kind;
    const float* step;  // [groups, out], only for codes
    int64_t group;      // channels that share a row of steps
    float offset;
    const void* up;  // [rank, out]
    int32_t factor_kind;
    const float* bias;  // [out] or null
    float* y;           // [out]
    int64_t out;
    const Chosen* kept;
    const Chosen* rescue;  // z, every rank once
};

// y += step * (sum of x * code + offset * sum of x), group by group
void add_codes(const Product& p, int64_t begin, int64_t width, float* y) {
    float sums[TILE];
    const int64_t count = p.kept->size();
    for (int64_t k = 0; k < count;) {
        const int64_t group = p.kept->index[k] / p.group;
        int64_t end = k;
        float inputs = 0.0f;
        for (; end < count && p.kept->index[end] / p.group == group; ++end) inputs += p.kept->value[end];
        std::fill(sums, sums + width, p.offset * inputs);
        add_rows(*p.kept, k, end, static_cast<const int8_t*>(p.weight), p.out, begin, width, sums);
        const float* step = p.step + group * p.out + begin;
        for (int64_t o = 0; o < width; ++o) y[o] += step[o] * sums[o];
        k = end;
    }
}

void part(const Product& p, int64_t first, int64_t last) {
    for (int64_t begin = first; begin < last; begin += TILE) {
        const int64_t width = std::min(TILE, last - begin);
        float* y = p.y + begin;
        if (p.bias)
            std::copy(p.bias + begin, p.bias + begin + width, y);
        else
            std::fill(y, y + width, 0.0f);
        if (p.kind == CODES)
            add_codes(p, begin, width, y);
        else
            add_kind(p.kind, *p.kept, p.weight, p.out, begin, width, y);
        if (p.rescue->size()) add_kind(p.factor_kind, *p.rescue, p.up, p.out, begin, width, y);
    }
}

}  // namespace

// x, scale [n], threshold -> y [out]. A channel is kept where |x| * scale > threshold. Returns how many were kept, or -1
// where memory ran out (y is then undefined).
extern "C" int64_t edgewright_sparse_rows(const float* x, const float* scale, float threshold, const void* weight,
                                          int32_t kind, const float* step, int64_t group, float offset,
                                          const void* down, const void* up, int32_t factor_kind, int64_t rank,
                                          const float* bias, float* y, int64_t n, int64_t out, int32_t threads) {
    try {
        Chosen kept, other, rescue;
        kept.reserve(n);
        if (rank) other.reserve(n);
        for (int64_t i = 0; i < n; ++i) {
            if (std::fabs(x[i]) * scale[i] > threshold)
                kept.add(i, x[i]);
            else if (rank)
                other.add(i, x[i]);
        }
        if (rank) {
            std::vector<float> z(static_cast<size_t>(rank), 0.0f);
            add_kind(factor_kind, other, down, rank, 0, rank, z.data());
            rescue.reserve(rank);
            for (int64_t j = 0; j < rank; ++j) rescue.add(j, z[j]);
        }
        const Product product{weight, kind, step, group, offset, up, factor_kind, bias, y, out, &kept, &rescue};
        const int64_t units = (out + SMALLEST_PART - 1) / SMALLEST_PART;
        const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, units));
        const auto edge = [&](int64_t k) { return std::min(out, units * k / parts * SMALLEST_PART); };
        std::vector<std::thread> helpers;
        int64_t begun = 0;
        try {
            for (; begun + 1 < parts; ++begun)
                helpers.emplace_back(part, std::cref(product), edge(begun), edge(begun + 1));
        } catch (...) {  // no more threads: the rest is done here
        }
        part(product, edge(begun), out);
        for (auto& helper : helpers) helper.join();
        return kept.size();
    } catch (const std::bad_alloc&) {
        return -1;
    }
}
