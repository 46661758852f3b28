// The passes between a decoder layer's matrix products, each over its data once: RMSNorm with the residual addition
// before it, the rotary embedding with the norms of q and k, SiLU(gate) * up, and the merge of two attention states.
// bf16 in and out (states also fp32), fp32 within, rounded once at the end.
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

// An attention state: out [rows, heads, dim] in bf16 or fp32, lse [rows, heads] in fp32.
struct State {
  State(const Tensor& out, const Tensor& lse)
      : out_data(static_cast<char*>(out.mutable_data_ptr())),
        size(out.element_size()),
        out_row(out.stride(0) * size),
        out_head(out.stride(1) * size),
        lse_data(static_cast<float*>(lse.mutable_data_ptr())),
        lse_row(lse.stride(0)),
        lse_head(lse.stride(1)) {
    const bool known = out.scalar_type() == ScalarType::BFloat16 || out.scalar_type() == ScalarType::Float;
    STD_TORCH_CHECK(known && out.dim() == 3 && out.stride(2) == 1,
                    "out: bfloat16 or float32 [rows, heads, dim], contiguous along dim");
    STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Float && lse.dim() == 2 && lse.size(0) == out.size(0) &&
                        lse.size(1) == out.size(1),
                    "lse: float32 [rows, heads], with out's");
  }

  float& lse(int64_t r, int64_t h) const { return lse_data[r * lse_row + h * lse_head]; }

  // A head's numbers in fp32: where they are, or in the buffer.
  const float* read(int64_t r, int64_t h, int64_t dim, float* buffer) const {
    const char* const at = out_data + r * out_row + h * out_head;
    if (size == sizeof(float)) return reinterpret_cast<const float*>(at);
    widen(reinterpret_cast<const Bf16*>(at), buffer, dim);
    return buffer;
  }

  void write(int64_t r, int64_t h, int64_t dim, const float* from) const {
    char* const at = out_data + r * out_row + h * out_head;
    if (size == sizeof(float)) {
      std::copy_n(from, dim, reinterpret_cast<float*>(at));
    } else {
      narrow(from, reinterpret_cast<Bf16*>(at), dim);
    }
  }

  char* out_data;
  int64_t size, out_row, out_head;  // in bytes
  float* lse_data;
  int64_t lse_row, lse_head;  // in numbers
};

// Two states over disjoint keys to a third, which may be one of them.
void merge_states(Tensor out, Tensor lse, Tensor other_out, Tensor other_lse, Tensor to_out, Tensor to_lse) {
  const int64_t rows = out.size(0), heads = out.size(1), dim = out.size(2);
  for (const Tensor& each : {other_out, to_out})
    STD_TORCH_CHECK(each.dim() == 3 && each.size(0) == rows && each.size(1) == heads && each.size(2) == dim,
                    "states that are merged have equal rows, heads and dim");
  const State mine(out, lse), theirs(other_out, other_lse), target(to_out, to_lse);
  for_rows(rows, heads * dim, [&](int64_t begin, int64_t end) {
    std::vector<float> buffers(3 * dim);
    float *const a = buffers.data(), *const b = a + dim, *const merged = b + dim;
    for (int64_t r = begin; r < end; r++) {
      for (int64_t h = 0; h < heads; h++) {
        const float x = mine.lse(r, h), y = theirs.lse(r, h);
        const float top = std::max(x, y), shift = top == -INFINITY ? 0.0f : top;
        const float of_a = exponential(x - shift), of_b = exponential(y - shift), total = of_a + of_b;
        const float by = total > 0 ? 1.0f / total : 0.0f, share_a = of_a * by, share_b = of_b * by;
        const float *const from_a = mine.read(r, h, dim, a), *const from_b = theirs.read(r, h, dim, b);
        for (int64_t d = 0; d < dim; d++) merged[d] = from_a[d] * share_a + from_b[d] * share_b;
        target.write(r, h, dim, merged);
        target.lse(r, h) = top + std::log(total);
      }
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sp_serve, library) {
  library.def("rms_norm(Tensor(a!) hidden, Tensor? delta, Tensor weight, float eps, Tensor(b!) out) -> ()");
  library.def("rotate(Tensor x, Tensor(a!) out, int heads, Tensor cos, Tensor sin, Tensor? norm, float eps) -> ()");
  library.def("silu_mul(Tensor gate_up, Tensor(a!) out) -> ()");
  library.def(
      "merge_states(Tensor out, Tensor lse, Tensor other_out, Tensor other_lse, Tensor(a!) to_out, Tensor(b!) to_lse) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sp_serve, CPU, library) {
  library.impl("rms_norm", TORCH_BOX(&rms_norm));
  library.impl("rotate", TORCH_BOX(&rotate));
  library.impl("silu_mul", TORCH_BOX(&silu_mul));
  library.impl("merge_states", TORCH_BOX(&merge_states));
}
