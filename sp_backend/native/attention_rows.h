// What a block of keys and values does to a few rows of queries: products, softmax, sums.
//
// Four keys share a vector, a quarter each, so that their products with a row of q are summed in few steps; values are
// multiplied as they are read.
#pragma once

#include "attention_ahead.h"

namespace {

__m512 dot(__m512 sum, __m512i a, __m512i b, BFloat16) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
__m512 dot(__m512 sum, __m512i a, __m512i b, float) {
  return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
}

// The four quarters of four vectors, gathered: quarter j of the result's vector i is quarter i of vector j.
[[gnu::always_inline]] inline void transpose_quarters(__m512i* r) {
  const __m512i a = _mm512_shuffle_i32x4(r[0], r[1], 0x44), b = _mm512_shuffle_i32x4(r[0], r[1], 0xee);
  const __m512i c = _mm512_shuffle_i32x4(r[2], r[3], 0x44), d = _mm512_shuffle_i32x4(r[2], r[3], 0xee);
  r[0] = _mm512_shuffle_i32x4(a, c, 0x88);
  r[1] = _mm512_shuffle_i32x4(a, c, 0xdd);
  r[2] = _mm512_shuffle_i32x4(b, d, 0x88);
  r[3] = _mm512_shuffle_i32x4(b, d, 0xdd);
}

// q [R, width in words] x keys: for each row and four keys, a vector of four sums for each key, to be added up in
// `sum_quarters`. Of every 16 keys, vector n has keys n, n + 4, n + 8, n + 12. Two vectors at a time share what is read
// of q.
template <class T, bool Whole, bool First, int R, int Keys>
void multiply_keys(const int32_t* q, int64_t width, const Block<Keys>& block, int64_t offset, int64_t dim, float* sums,
                   Ahead<Keys>& ahead) {
  constexpr int kSums = R >= 4 ? 1 : 4 / R;  // of a row: enough in flight to hide the time that a product takes
  for (int64_t n = 0; n < Keys / 4; n += 2) {
    const char* const* key = block.key + n / 4 * 16 + n % 4;
    __m512 sum[2][R][kSums];
    for (auto& vector : sum)
      for (auto& row : vector)
        for (auto& x : row) x = _mm512_setzero_ps();
    for (int64_t w = 0; w < width; w += 16) {
      const __mmask16 mask = Whole ? 0xffff : lanes(0, {0, words<T>(dim) - w});
      __m512i k[2][4];
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) k[i % 2][i / 2] = _mm512_maskz_loadu_epi32(mask, key[i / 2 * 4 + i % 2] + offset + 4 * w);
      if constexpr (First) ahead.template ask<8>();
      transpose_quarters(k[0]);
      transpose_quarters(k[1]);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
          const __m128i part = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q + r * width + w + 4 * i));
          const __m512i x = _mm512_broadcast_i32x4(part);
          sum[0][r][i % kSums] = dot(sum[0][r][i % kSums], k[0][i], x, T());
          sum[1][r][i % kSums] = dot(sum[1][r][i % kSums], k[1][i], x, T());
        }
      }
    }
    for (int r = 0; r < R; r++) {
      for (int i = 1; i < kSums; i++) {
        sum[0][r][0] = _mm512_add_ps(sum[0][r][0], sum[0][r][i]);
        sum[1][r][0] = _mm512_add_ps(sum[1][r][0], sum[1][r][i]);
      }
      _mm512_storeu_ps(sums + (r * Keys + 4 * n) * 4, sum[0][r][0]);
      _mm512_storeu_ps(sums + (r * Keys + 4 * n + 4) * 4, sum[1][r][0]);
    }
  }
}

// The sums of 16 keys, of four numbers each.
__m512 sum_quarters(const float* sums) {
  const auto add = [](__m512 a, __m512 b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); };
  const __m512 a = add(_mm512_loadu_ps(sums), _mm512_loadu_ps(sums + 32));
  const __m512 b = add(_mm512_loadu_ps(sums + 16), _mm512_loadu_ps(sums + 48));
  return add(a, b);
}

// Numbers [d, d + 32) of the value at step n: in fp32 key n; in bf16 keys 2n and 2n + 1, interleaved.
template <bool Whole>
Pair value_at(const char* const* rows, int64_t offset, int64_t n, int64_t d, int64_t dim, float) {
  const char* at = rows[n] + offset + 4 * d;
  return {_mm512_maskz_loadu_epi32(Whole ? 0xffff : lanes(0, {0, dim - d}), at),
          _mm512_maskz_loadu_epi32(Whole ? 0xffff : lanes(16, {0, dim - d}), at + 64)};
}
template <bool Whole>
Pair value_at(const char* const* rows, int64_t offset, int64_t n, int64_t d, int64_t dim, BFloat16) {
  const auto mask = static_cast<__mmask32>(Whole || dim - d >= 32 ? ~0u : (1u << (dim - d)) - 1);
  const __m512i a = _mm512_maskz_loadu_epi16(mask, rows[2 * n] + offset + 2 * d);
  const __m512i b = _mm512_maskz_loadu_epi16(mask, rows[2 * n + 1] + offset + 2 * d);
  return interleave(a, b);
}

// out [R, dim] += p [R, Keys] x values, for C times 32 numbers from d on.
template <class T, bool Whole, bool First, int R, int C, int Keys>
void add_columns(const T* p, const Block<Keys>& block, int64_t offset, int64_t d, int64_t dim, float* out,
                 Ahead<Keys>& ahead) {
  constexpr int64_t steps = Keys * sizeof(T) / 4;
  const auto* weights = reinterpret_cast<const int32_t*>(p);
  const int64_t padded = round_up(dim, 32);
  __m512 sum[R][2 * C];
  for (int r = 0; r < R; r++)
    for (int i = 0; i < 2 * C; i++) sum[r][i] = _mm512_loadu_ps(out + r * padded + d + 16 * i);
  for (int64_t n = 0; n < steps; n++) {
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) {
      const Pair v = value_at<Whole>(block.value, offset, n, d + 32 * c, dim, T());
      if constexpr (First) ahead.template ask<2>();
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const __m512i x = _mm512_set1_epi32(weights[r * steps + n]);
        sum[r][2 * c] = dot(sum[r][2 * c], v.low, x, T());
        sum[r][2 * c + 1] = dot(sum[r][2 * c + 1], v.high, x, T());
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int i = 0; i < 2 * C; i++) _mm512_storeu_ps(out + r * padded + d + 16 * i, sum[r][i]);
}

template <class T, bool Whole, bool First, int R, int Keys>
void add_values(const T* p, const Block<Keys>& block, int64_t offset, int64_t dim, float* out, Ahead<Keys>& ahead) {
  constexpr int kMost = R >= 8 ? 1 : R >= 4 ? 2 : 4;  // columns whose sums fit the registers
  int64_t d = 0;
  for (; dim - d > 32 * (kMost - 1); d += 32 * kMost)
    add_columns<T, Whole, First, R, kMost>(p, block, offset, d, dim, out, ahead);
  if constexpr (kMost > 2)
    for (; dim - d > 32; d += 64) add_columns<T, Whole, First, R, 2>(p, block, offset, d, dim, out, ahead);
  if constexpr (kMost > 1)
    for (; dim > d; d += 32) add_columns<T, Whole, First, R, 1>(p, block, offset, d, dim, out, ahead);
}

// One row's running softmax.
struct Row {
  float* out;  // [padded] not divided by the sum
  float* sum;  // [16] lanes
  float* top;  // maximum, in base 2
};

// p = 2^(s * scale - top) of a block's keys where they are seen, 0 elsewhere.
template <class T, int Keys>
void softmax(const float* sums, Range seen, float scale, const Row& row, int64_t padded, T* p) {
  constexpr int kVectors = Keys / 16;
  __mmask16 mask[kVectors];
  __m512 x[kVectors], most = _mm512_set1_ps(-INFINITY);
  for (int i = 0; i < kVectors; i++) {
    mask[i] = lanes(16 * i, seen);
    x[i] = _mm512_mask_mul_ps(_mm512_set1_ps(-INFINITY), mask[i], sum_quarters(sums + 64 * i), _mm512_set1_ps(scale));
    most = _mm512_max_ps(most, x[i]);
  }
  if (_mm512_cmp_ps_mask(most, _mm512_set1_ps(*row.top), _CMP_GT_OQ)) {  // seldom, after some blocks
    const float top = _mm512_reduce_max_ps(most);
    const __m512 shrink = _mm512_set1_ps(std::exp2(*row.top - top));
    *row.top = top;
    _mm512_storeu_ps(row.sum, _mm512_mul_ps(_mm512_loadu_ps(row.sum), shrink));
    for (int64_t d = 0; d < padded; d += 16)
      _mm512_storeu_ps(row.out + d, _mm512_mul_ps(_mm512_loadu_ps(row.out + d), shrink));
  }
  for (int i = 0; i < kVectors; i++) {
    const __m512 y = _mm512_maskz_mov_ps(mask[i], exp2(_mm512_sub_ps(x[i], _mm512_set1_ps(*row.top))));
    _mm512_storeu_ps(row.sum, _mm512_add_ps(_mm512_loadu_ps(row.sum), y));
    store(p + 16 * i, y);
  }
}

}  // namespace
