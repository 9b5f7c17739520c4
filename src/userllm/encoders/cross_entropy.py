"""Full-catalogue cross-entropy that never holds all logits.

``torch.nn.functional.cross_entropy`` writes the [N, V] logits, their log-softmax and their gradient. With V in the
thousands that memory traffic, not the arithmetic, is what pretraining spends its time on. Here a block of rows is
scored, turned into probabilities in place and multiplied back into both gradients while still in cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _BlockedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, table: Tensor, target: Tensor, rows: int) -> Tensor:
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        count = max(hidden.shape[0], 1)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_table = torch.zeros_like(table) if needs_grad else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, hidden.shape[0], rows):
            h, t = hidden[start : start + rows], target[start : start + rows]
            p = torch.softmax(h @ table.T, dim=-1)
            at_target = p.gather(1, t[:, None])
            log_p = at_target.log()
            if (lost := at_target[:, 0] < torch.finfo(p.dtype).tiny).any():  # too small to be told from 0
                log_p[lost] = torch.log_softmax(h[lost] @ table.T, dim=-1).gather(1, t[lost, None])
            total -= log_p.sum()
            if grad_hidden is not None and grad_table is not None:
                p.scatter_(1, t[:, None], at_target - 1.0)
                torch.mm(p, table, out=grad_hidden[start : start + rows])
                grad_table.addmm_(p.T, h)
        if grad_hidden is not None and grad_table is not None:
            ctx.save_for_backward(grad_hidden.div_(count), grad_table.div_(count))
        return total / count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_table = ctx.saved_tensors
        return grad_hidden * grads[0], grad_table * grads[0], None, None


def blocked_cross_entropy(hidden: Tensor, table: Tensor, target: Tensor, rows: int = 512) -> Tensor:
    """Mean cross-entropy of ``softmax(hidden @ table.T)`` against ``target``, in nats; exact, computed in blocks.

    hidden [N, d], table [V, d], target [N] in 0..V-1; ``rows`` logits rows are alive at once. An empty batch gives 0.
    Gradients are computed in the forward pass, so double backward is not supported.
    """
    return _BlockedCrossEntropy.apply(hidden, table, target, rows)  # type: ignore[no-any-return]
