"""Full-catalogue cross-entropy that never holds all logits.

``torch.nn.functional.cross_entropy`` writes the [N, V] logits, their log-softmax and their gradient. With V in the
thousands that memory traffic, not the arithmetic, is what pretraining spends its time on. Here a block of rows is
scored, turned into probabilities in place and multiplied back into both gradients while still in cache.
Its three matrix products may be taken in a lower precision; probabilities and sums keep the precision of the input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from userllm import processes
from userllm.bfloat16 import operand, rounded


class _BlockedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        table: Tensor,
        target: Tensor,
        rows: int,
        precision: torch.dtype,
        count: float,
    ) -> Tensor:
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_table = torch.zeros_like(table) if needs_grad else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        low_hidden, low_table = operand(hidden, precision), operand(table, precision)
        for start in range(0, hidden.shape[0], rows):
            h, t = low_hidden[start : start + rows], target[start : start + rows]
            p = torch.softmax(rounded(h @ low_table.T, precision), dim=-1, dtype=hidden.dtype)
            at_target = p.gather(1, t[:, None])
            log_p = at_target.log()
            if (lost := at_target[:, 0] < torch.finfo(p.dtype).tiny).any():  # too small to be told from 0
                logits = rounded(h[lost] @ low_table.T, precision)
                log_p[lost] = torch.log_softmax(logits, dim=-1, dtype=hidden.dtype).gather(1, t[lost, None])
            total -= log_p.sum()
            if grad_hidden is not None and grad_table is not None:
                p.scatter_(1, t[:, None], at_target - 1.0)
                p = operand(p, precision)
                grad_hidden[start : start + rows] = rounded(p @ low_table, precision)
                if precision == grad_table.dtype:
                    grad_table.addmm_(p.T, h)
                else:  # a block's product is rounded, the sum over blocks is not
                    grad_table += rounded(p.T @ h, precision)
        if grad_hidden is not None and grad_table is not None:
            ctx.save_for_backward(grad_hidden.div_(count), grad_table.div_(count))
        return total / count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        grad_hidden, grad_table = ctx.saved_tensors
        return grad_hidden * grads[0], grad_table * grads[0], None, None, None, None


def blocked_cross_entropy(
    hidden: Tensor, table: Tensor, target: Tensor, rows: int = 512, precision: torch.dtype | None = None
) -> Tensor:
    """Mean cross-entropy of ``softmax(hidden @ table.T)`` against ``target``, in nats; exact, computed in blocks.

    hidden [N, d], table [V, d], target [N] in 0..V-1; ``rows`` logits rows are alive at once. An empty batch gives 0.
    precision: of the three matrix products (logits, both gradients); that of ``hidden`` by None. Softmax, loss and the
    sums over blocks keep the precision of ``hidden``. Gradients are computed in the forward pass, so double backward is
    not supported.
    """
    count = processes.share(len(target))
    return _BlockedCrossEntropy.apply(hidden, table, target, rows, precision or hidden.dtype, count)  # type: ignore[no-any-return]
