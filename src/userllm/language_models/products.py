"""Matrix products in bfloat16 inside a float32 language model (ours).

Processors with bfloat16 instructions (AVX512-BF16, AMX, any recent GPU) multiply matrices several times as fast in it;
what lies between the products is no faster, or slower. So only the layers' products are done in bfloat16, summed up in
float32 by the hardware and rounded once per product; weights, norms, residual stream, attention, the embeddings and the
logits stay float32.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Bfloat16Linear(nn.Linear):
    """A linear layer with the weights of another one; its product is done in bfloat16, its output is of x's type.

    A frozen weight is cast once and kept, which takes half of its memory again; one that is trained is cast anew each
    time.
    """

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._kept: tuple[int, Tensor] | None = None

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        bias = None if self.bias is None else self.bias.bfloat16()
        return F.linear(input.bfloat16(), self._weight(), bias).to(input.dtype)

    def _weight(self) -> Tensor:
        weight = self.weight
        if weight.requires_grad:
            return weight.bfloat16()
        # the version moves with every change in place, such as the loading of other weights
        if self._kept is None or self._kept[0] != weight._version or self._kept[1].device != weight.device:
            self._kept = (weight._version, weight.detach().bfloat16())
        return self._kept[1]


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
