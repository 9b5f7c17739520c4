"""Matrix products in bfloat16 inside a float32 language model (ours).

Processors with bfloat16 instructions multiply matrices several times as fast in it; what lies between the products is
no faster, or slower. So only the layers' products are done in bfloat16, summed up in float32 and rounded once per
product; weights, norms, residual stream, attention, the embeddings and the logits stay float32. Processors without give
the same numbers in float32's time (``userllm.bfloat16``).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from userllm.bfloat16 import operand, rounded


class Bfloat16Linear(nn.Linear):
    """A linear layer with the weights of another one; its product is done in bfloat16, its output is of x's type.

    A frozen weight is cast once and kept, which takes half of its memory again (all of it on processors without
    bfloat16); one that is trained is cast anew each time.
    """

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._kept: tuple[tuple[int, int, torch.device], Tensor] | None = None

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        bias = None if self.bias is None else operand(self.bias)
        return rounded(F.linear(operand(input), self._weight(), bias)).to(input.dtype)

    def _weight(self) -> Tensor:
        weight = self.weight
        if weight.requires_grad:
            return operand(weight)
        # the version moves with every change in place, such as the loading of other weights; the place with others put
        # there, as `weight.data = ...` does
        state = (weight._version, weight.data_ptr(), weight.device)
        if self._kept is None or self._kept[0] != state:
            self._kept = (state, operand(weight.detach()))
        return self._kept[1]


def products_are_rounded(lm: nn.Module) -> bool:
    """Whether ``products_in_bfloat16`` was done to it."""
    return any(isinstance(module, Bfloat16Linear) for module in lm.modules())


def products_in_bfloat16(lm: nn.Module) -> int:
    """Replace every linear layer inside the LM's lists of layers, in place; returns how many there were.

    The head, which lies outside them, is left as it is: rounded logits would be rounded log-likelihoods.
    """
    inside = {
        id(part) for layers in lm.modules() if isinstance(layers, nn.ModuleList) for part in layers.modules()
    }
    replaced = 0
    for module in list(lm.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and id(child) in inside:
                setattr(module, name, Bfloat16Linear(child))
                replaced += 1
    return replaced
