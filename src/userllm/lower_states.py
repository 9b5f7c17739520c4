"""What a language model makes of closed answers below the first fused layer, where nothing depends on the user."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from userllm.decoding.answers import AnswerTexts, ClosedAnswers
from userllm.fusion.attach import Attachment


@dataclass
class LowerStates:
    """Hidden states below the first fused layer for one prompt and its answers: they do not depend on the user.

    prompt [P-1, D], nodes [rows, D]; row [trie nodes] is each node's row in ``nodes``.
    """

    prompt: Tensor
    nodes: Tensor
    row: Tensor

    def of(self, texts: AnswerTexts) -> Tensor:
        """States [E, T, D] of teacher-forced texts."""
        tail = self.nodes[self.row[texts.nodes_at[:, len(self.prompt) :].clamp_min(0)]]
        return torch.cat([self.prompt.expand(len(tail), -1, -1), tail], dim=1)

    @classmethod
    def stored(
        cls, closed: ClosedAnswers, attachment: Attachment, lm: PreTrainedModel, batch: int
    ) -> LowerStates:
        """Every node of the answers' tree, computed once per distinct text, ``batch`` texts at a time."""
        tree = closed.tree
        needed = tree.high - tree.low > 1
        needed[0] = True
        row = torch.cumsum(needed.long(), 0) - 1
        inner = torch.zeros_like(needed)
        inner[tree.parent[1:][needed[1:]]] = True
        # the answers whose texts end on a needed node that no other needed node goes through
        last = tree.paths.gather(1, closed.reach[:, None])[:, 0]
        ends = torch.unique(last[~inner[last]]) if bool((~inner[last]).any()) else last[:1]
        position = torch.full((len(tree.token),), -1, dtype=torch.long, device=row.device)
        position[last] = torch.arange(len(last), device=row.device)
        chosen = position[ends]
        chosen = chosen[torch.argsort(closed.reach[chosen])]
        nodes = torch.empty(int(needed.sum()), lm.config.get_text_config().hidden_size, device=row.device)
        nodes = nodes.to(lm.dtype)
        prompt = len(closed.prompt_ids) - 1
        head = nodes[:0]
        for part in chosen.split(batch):
            texts = closed.texts(part)
            states = attachment.lower_states(lm, texts.input_ids)
            at = texts.nodes_at >= 0
            nodes[row[texts.nodes_at[at]]] = states[at]
            head = states[0, :prompt]
        return cls(head.clone(), nodes, row)
