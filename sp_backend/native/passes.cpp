// The passes of a decoder layer between its matrix products, each over the activations once: RMSNorm with the residual
// addition before it, the rotary embedding with the norms of q and k, and SiLU(gate) * up. bf16 in and out, fp32
// within, rounded once at the end.
//
// Rows are split over torch's threads. The loops are plain, for the compiler to vectorise: a row is widened into a
// buffer in the first-level cache, worked on there, and rounded into its place.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Bf16 = uint16_t;  // its bits

constexpr int64_t kGrainElements = 1 << 15;  // fewer are not worth another thread

inline void widen(const Bf16* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i++) out[i] = std::bit_cast<float>(uint32_t(in[i]) << 16);
}

// To nearest, ties to even; NaN stays NaN.
inline void narrow(const float* in, Bf16* out, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    const uint32_t bits = std::bit_cast<uint32_t>(in[i]);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    out[i] = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : Bf16(rounded);
  }
}

// e^x to about 1e-7, 0 or infinity beyond +-88: 2^n e^f with |f| <= ln(2) / 2, and the Taylor series of e^f.
inline float exponential(float x) {
  x = x < -88.0f ? -88.0f : x > 89.0f ? 89.0f : x;  // 89: n is 128, infinity's exponent
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: its low bits are now the nearest integer
  const float n = shifted - 12582912.0f;
  const float f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.0f / 720;
  p = p * f + 1.0f / 120;
  p = p * f + 1.0f / 24;
  p = p * f + 1.0f / 6;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  return p * std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) - 0x4b400000u + 127u) << 23);
}

inline float inverse_rms(const float* row, int64_t n, float eps) {
  constexpr int64_t kLanes = 32;  // sums of their own: a compiler may not change the order of additions by itself
  float sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; lane++) sums[lane] += row[i + lane] * row[i + lane];
  for (; i < n; i++) sums[i % kLanes] += row[i] * row[i];
  for (int64_t width = kLanes / 2; width; width /= 2)
    for (int64_t lane = 0; lane < width; lane++) sums[lane] += sums[lane + width];
  return 1.0f / std::sqrt(sums[0] / float(n) + eps);
}

template <typename Function>
void for_rows(int64_t rows, int64_t elements_per_row, const Function& function) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrainElements / elements_per_row), function);
}

const Bf16* read(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::BFloat16 && tensor.stride(-1) == 1, "expected bfloat16 rows");
  return static_cast<const Bf16*>(tensor.const_data_ptr());
}

Bf16* written(const Tensor& tensor) {
  read(tensor);
  return static_cast<Bf16*>(tensor.mutable_data_ptr());
}

const float* angles(const Tensor& tensor, int64_t rows, int64_t half) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() && tensor.size(0) == rows &&
                      tensor.size(1) == half,
                  "cos and sin: contiguous float32 [rows, head_dim / 2]");
  return static_cast<const float*>(tensor.const_data_ptr());
}

std::vector<float> weights(const Tensor& norm, int64_t n) {
  STD_TORCH_CHECK(norm.dim() == 1 && norm.size(0) == n, "a norm has one weight for each of ", n, " columns");
  std::vector<float> wide(n);
  widen(read(norm), wide.data(), n);
  return wide;
}

// hidden [rows, n] += delta [rows, n], if given; out [rows, n] = hidden normed, times weight [n].
void rms_norm(Tensor hidden, std::optional<Tensor> delta, Tensor weight, double eps, Tensor out) {
  const int64_t rows = hidden.size(0), n = hidden.size(1);
  STD_TORCH_CHECK(hidden.is_contiguous() && out.is_contiguous() && out.size(0) == rows && out.size(1) == n,
                  "hidden and out: contiguous [rows, n]");
  STD_TORCH_CHECK(!delta || (delta->is_contiguous() && delta->size(0) == rows && delta->size(1) == n),
                  "delta: contiguous [rows, n]");
  Bf16 *const residual = written(hidden), *const to = written(out);
  const Bf16* const addend = delta ? read(*delta) : nullptr;
  const std::vector<float> scale = weights(weight, n);
  for_rows(rows, n, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(2 * n);
    float *const row = buffer.data(), *const added = row + n;
    for (int64_t r = begin; r < end; r++) {
      widen(residual + r * n, row, n);
      if (addend) {
        widen(addend + r * n, added, n);
        for (int64_t i = 0; i < n; i++) row[i] += added[i];
        narrow(row, residual + r * n, n);
        widen(residual + r * n, row, n);  // the norm is of what is kept
      }
      const float factor = inverse_rms(row, n, float(eps));
      for (int64_t i = 0; i < n; i++) row[i] *= factor * scale[i];
      narrow(row, to + r * n, n);
    }
  });
}

// One head: normed if there is a weight, then turned by its row's angles.
inline void turn(const Bf16* in, Bf16* out, const float* cos, const float* sin, const float* weight, float eps,
                 float* head, int64_t dim) {
  const int64_t half = dim / 2;
  float* const turned = head + dim;
  widen(in, head, dim);
  if (weight) {
    const float factor = inverse_rms(head, dim, eps);
    for (int64_t i = 0; i < dim; i++) head[i] *= factor * weight[i];
  }
  for (int64_t i = 0; i < half; i++) {
    turned[i] = head[i] * cos[i] - head[half + i] * sin[i];
    turned[half + i] = head[half + i] * cos[i] + head[i] * sin[i];
  }
  narrow(turned, out, dim);
}

// x [rows, columns] to out [rows, ..., head_dim] of as many elements: the first `heads` heads normed by norm
// [head_dim], if given, and turned by the angles whose cos and sin are [rows, head_dim / 2]; the rest copied.
void rotate(Tensor x, Tensor out, int64_t heads, Tensor cos, Tensor sin, std::optional<Tensor> norm, double eps) {
  const int64_t rows = x.size(0), columns = x.size(1), stride = x.stride(0), dim = out.size(-1), half = dim / 2;
  STD_TORCH_CHECK(out.is_contiguous() && out.size(0) == rows && out.numel() == rows * columns,
                  "out: contiguous, with x's rows and columns");
  STD_TORCH_CHECK(dim % 2 == 0 && heads * dim <= columns, "x: at least `heads` heads of an even size");
  const Bf16* const from = read(x);
  Bf16* const to = written(out);
  const float *const cosines = angles(cos, rows, half), *const sines = angles(sin, rows, half);
  const std::vector<float> scale = norm ? weights(*norm, dim) : std::vector<float>();
  for_rows(rows, columns, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(2 * dim);
    for (int64_t r = begin; r < end; r++) {
      const Bf16* const in = from + r * stride;
      Bf16* const place = to + r * columns;
      for (int64_t h = 0; h < heads; h++)
        turn(in + h * dim, place + h * dim, cosines + r * half, sines + r * half, norm ? scale.data() : nullptr,
             float(eps), buffer.data(), dim);
      std::copy(in + heads * dim, in + columns, place + heads * dim);
    }
  });
}

// out [rows, n] = SiLU(gate) * up of gate_up [rows, 2 n], gate left of up.
void silu_mul(Tensor gate_up, Tensor out) {
  const int64_t rows = out.size(0), n = out.size(1);
  STD_TORCH_CHECK(gate_up.is_contiguous() && out.is_contiguous() && gate_up.size(0) == rows && gate_up.size(1) == 2 * n,
                  "gate_up: contiguous [rows, 2 n]; out: contiguous [rows, n]");
  const Bf16* const from = read(gate_up);
  Bf16* const to = written(out);
  for_rows(rows, 2 * n, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(2 * n);
    float *const gate = buffer.data(), *const up = gate + n;
    for (int64_t r = begin; r < end; r++) {
      widen(from + r * 2 * n, gate, 2 * n);
      for (int64_t i = 0; i < n; i++) gate[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
      narrow(gate, to + r * n, n);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sp_serve, library) {
  library.def("rms_norm(Tensor(a!) hidden, Tensor? delta, Tensor weight, float eps, Tensor(b!) out) -> ()");
  library.def("rotate(Tensor x, Tensor(a!) out, int heads, Tensor cos, Tensor sin, Tensor? norm, float eps) -> ()");
  library.def("silu_mul(Tensor gate_up, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sp_serve, CPU, library) {
  library.impl("rms_norm", TORCH_BOX(&rms_norm));
  library.impl("rotate", TORCH_BOX(&rotate));
  library.impl("silu_mul", TORCH_BOX(&silu_mul));
}
