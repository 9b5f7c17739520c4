"""Matrix products in bfloat16, also on processors that cannot do them.

A processor with bfloat16 instructions (AVX512-BF16, AMX, ARM's BF16, any recent GPU) multiplies two bfloat16 matrices,
sums up in float32 and rounds once. On any other torch has kernels for it that are tens of times slower than float32's.
There the same operands, rounded to bfloat16, are multiplied in float32 and the product is rounded: the same numbers
but for the order of the sums, at about float32's speed.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def _cpu_multiplies() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def multiplies(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices by instructions of its own; of accelerators that is assumed."""
    return device.type != "cpu" or _cpu_multiplies()


def operand(x: Tensor, precision: torch.dtype = torch.bfloat16) -> Tensor:
    """x rounded to ``precision``, in a type that its device multiplies fast; x itself where that is its precision."""
    low = x.to(precision)
    return low if precision != torch.bfloat16 or multiplies(x.device) else low.float()


def rounded(product: Tensor, precision: torch.dtype = torch.bfloat16) -> Tensor:
    """A product of two ``operand``s, rounded to ``precision`` where that has not been done."""
    return product.to(precision)
