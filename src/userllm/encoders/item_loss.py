"""The next item's loss: over the whole catalogue, or over a sample of it where the catalogue is large.

The sample is drawn once per call and shared by all its rows. Ranking never samples: evaluation is over the catalogue.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from userllm import processes
from userllm.encoders.cross_entropy import blocked_cross_entropy


class ItemLoss(nn.Module):
    """One of three losses of outputs [N, d] against the item table [V, d] and the right items' rows [N], mean over N.

    "full": cross-entropy over the catalogue, its products in ``precision``. "sampled": see ``sampled_cross_entropy``.
    "gbce": see ``gbce``. ``frequencies`` [V], counts of training targets, is what the popularity proposal draws by.
    """

    frequencies: Tensor

    def __init__(
        self,
        kind: Literal["full", "sampled", "gbce"],
        items: int,
        negatives: int,
        proposal: Literal["uniform", "popularity"],
        calibration: float,
        precision: torch.dtype,
    ):
        super().__init__()
        self.kind = kind
        self.negatives = negatives
        self.calibration = calibration
        self.precision = precision
        self.by_popularity = kind == "sampled" and proposal == "popularity"
        self.register_buffer("frequencies", torch.zeros(items), persistent=False)

    def forward(self, hidden: Tensor, table: Tensor, target: Tensor) -> Tensor:
        """See the class. An empty batch gives 0."""
        if self.kind == "full":
            return blocked_cross_entropy(hidden, table, target, precision=self.precision)
        drawn, log_inclusion = self.draw()
        if self.kind == "sampled":
            return sampled_cross_entropy(hidden, table, target, drawn, log_inclusion)
        return gbce(hidden, table, target, drawn, self.calibration)

    def draw(self) -> tuple[Tensor, Tensor]:
        """Distinct items [n <= negatives], and the log of each one's probability to be among them, [n].

        As many draws with replacement as ``negatives``, by popularity with probabilities of count + 1 (so that no item
        is left out for ever); doubles count once. Where the catalogue is no larger than that, all of it.
        """
        items, device = len(self.frequencies), self.frequencies.device
        if self.negatives >= items:
            return torch.arange(items, device=device), torch.zeros(items, device=device)
        if not self.by_popularity:
            drawn = torch.randint(items, (self.negatives,), device=device).unique()
            probability = torch.full_like(drawn, 1 / items, dtype=torch.double)
        elif not self.frequencies.any():
            raise RuntimeError("items are to be drawn by popularity: call use_frequencies before training")
        else:
            weights = (self.frequencies + 1).double()
            drawn = torch.multinomial(weights, self.negatives, replacement=True).unique()
            probability = (weights / weights.sum())[drawn]
        inclusion = -torch.expm1(self.negatives * torch.log1p(-probability))
        return drawn, inclusion.log().float()


def sampled_cross_entropy(
    hidden: Tensor, table: Tensor, target: Tensor, drawn: Tensor, log_inclusion: Tensor
) -> Tensor:
    """Mean cross-entropy whose normaliser is estimated from a sample of the catalogue, in nats.

    A drawn item's logit is lowered by the log of its probability to be drawn (the logQ correction; Bengio & Senecal
    2008), so that the sum over the sample is an unbiased estimate of the sum over the other items. The target is always
    there, so its logit is not corrected and it does not count a second time when drawn. With every item drawn this is
    the full cross-entropy.
    """
    logits = hidden @ table[drawn].T - log_inclusion
    logits = logits.masked_fill(drawn == target[:, None], -torch.inf)
    right = (hidden * table[target]).sum(-1)
    losses = torch.logsumexp(torch.cat([right[:, None], logits], dim=1), dim=1) - right
    return losses.sum() / processes.share(len(target))


def gbce(hidden: Tensor, table: Tensor, target: Tensor, drawn: Tensor, calibration: float) -> Tensor:
    """Generalised binary cross-entropy (gSASRec, Petrov & Macdonald 2023), mean over rows, in nats.

    -(beta log s(right) + sum over the k negatives of log(1 - s(wrong))) / (k + 1), s the sigmoid, with
    beta = alpha (t (1 - 1/alpha) + 1/alpha), alpha = k / (V - 1), and calibration t from 0 (plain binary cross-entropy)
    to 1 (scores are log-odds that no longer depend on the sampling). Ours: negatives are shared by the batch, so a
    row's own target is left out of them, and k is counted by row.
    """
    wrong = F.logsigmoid(-(hidden @ table[drawn].T))
    hit = drawn == target[:, None]
    k = (~hit).sum(1)
    alpha = k / max(len(table) - 1, 1)
    beta = calibration * (alpha - 1) + 1  # the formula above, multiplied out: no division by alpha = 0
    right = F.logsigmoid((hidden * table[target]).sum(-1))
    losses = -(beta * right + wrong.masked_fill(hit, 0).sum(1)) / (k + 1)
    return losses.sum() / processes.share(len(target))
