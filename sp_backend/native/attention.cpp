// Attention with log-sum-exp on AVX-512 BF16.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace {
int64_t vector_bytes() { return 64; }
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sp_serve, m) { m.def("vector_bytes() -> int"); }
STABLE_TORCH_LIBRARY_IMPL(sp_serve, CompositeExplicitAutograd, m) { m.impl("vector_bytes", TORCH_BOX(&vector_bytes)); }
