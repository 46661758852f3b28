"""Linear layers. On a CPU, oneDNN keeps the weights in the order in which its kernels read them.

A plain matrix is brought into that order again by every product; packed once, the products run at the machine's matrix
rate from about 64 rows, and at memory speed for the few rows of decode. The packed matrix replaces the plain one. It
is what torch's own compiler calls for frozen weights; the operators are internal to torch, whose version is pinned.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Linear:
    """y = x W^T + bias, for W [out_features, in_features]. Filled in place, then packed."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.bias = bias
        self._weight = weight
        self._packed = False

    def pack(self) -> None:
        """Gives up the plain matrix: from now on it is not seen from outside. Nothing happens where it cannot pay."""
        assert not self._packed
        if can_pack(self._weight):
            self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight)
            self._packed = True

    def __call__(self, x: Tensor) -> Tensor:
        """Of x [rows, in_features]: [rows, out_features], in the same dtype."""
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """As a call, but with this bias."""
        if self._packed:
            result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, bias, "none", [], "")
            return result
        return F.linear(x, self._weight, bias)


def can_pack(weight: Tensor) -> bool:
    """oneDNN is there and this CPU computes in this dtype; older ones convert bf16 to fp32 and back."""
    if weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if weight.dtype == torch.bfloat16:
        supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return supported
    return weight.dtype == torch.float32
