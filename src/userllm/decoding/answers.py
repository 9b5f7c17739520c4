"""A closed set of answers to one prompt, as a language model sees it: texts, choices, and log-likelihoods.

Two normalisations of an answer's log-likelihood:
  - ``"catalogue"`` (ours, default): each step's softmax runs over the tokens that continue some answer. The result is
    an exact distribution over the answers (it sums to 1), forced steps cost nothing and are not even computed.
  - ``"vocabulary"`` (the papers'): each step's softmax runs over the LM's whole vocabulary, every token counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from userllm.decoding.prefix_tree import PrefixTree, segment_log_softmax

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Normalization = Literal["catalogue", "vocabulary"]
Advice = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Someone else's say in a choice: the LM's logits [C] of children -> logits [C]; also given the nodes [Q] chosen at,
the children's rows in Q, and the children, [C]."""


@dataclass
class AnswerTexts:
    """Teacher-forced texts of E answers, padded on the right, and where their choices are.

    input_ids [E, T]; nodes_at [E, T] trie node at each position (-1 in prompt and padding).
    For each of Q choices: row [Q] in E, position [Q] in T whose output makes it, node [Q] it is made at, and the
    child [Q] taken.
    """

    input_ids: Tensor
    nodes_at: Tensor
    row: Tensor
    position: Tensor
    node: Tensor
    child: Tensor


class ClosedAnswers:
    """N answers behind one prompt.

    prompt_ids [P] on the LM's device. Answer n's text is the prompt's tokens followed by the trie's path to n.
    """

    def __init__(self, prompt_ids: Tensor, tree: PrefixTree, normalization: Normalization = "catalogue"):
        if len(prompt_ids) == 0:
            raise ValueError("a prompt needs at least one token: the first choice is made at its end")
        self.prompt_ids = prompt_ids
        self.tree = tree.to(prompt_ids.device)
        self.normalization: Normalization = normalization
        inside = self.tree.paths >= 0
        at = self.tree.paths.clamp_min(0)
        # a choice is a node with several children ("catalogue") or with any ("vocabulary")
        least = 2 if normalization == "catalogue" else 1
        self._choice = inside & (self.tree.child_count[at] >= least)
        # [N] tokens of each answer that must be read: those before its last choice
        steps = torch.arange(at.shape[1], device=at.device)
        self.reach = torch.where(self._choice, steps, 0).amax(1)

    def __len__(self) -> int:
        return len(self.tree)

    def to(self, device: torch.device) -> ClosedAnswers:
        """The same answers on another device."""
        if device == self.prompt_ids.device:
            return self
        return ClosedAnswers(self.prompt_ids.to(device), self.tree, self.normalization)

    def texts(self, answers: Tensor) -> AnswerTexts:
        """Texts for answers [E] (indices in 0..N-1), each cut after its last choice."""
        prompt, tree = len(self.prompt_ids), self.tree
        longest = int(self.reach[answers].max()) if len(answers) else 0
        paths, last = tree.paths[answers][:, : longest + 1], self.reach[answers]
        steps = torch.arange(longest + 1, device=paths.device)
        used = steps[None] <= last[:, None]
        nodes_at = torch.where(used, paths, -1)
        read = nodes_at[:, 1:]
        tail = torch.where(read >= 0, tree.token[read.clamp_min(0)], self.prompt_ids[0])
        input_ids = torch.cat([self.prompt_ids.expand(len(answers), -1), tail], dim=1)
        filler = nodes_at.new_full((len(answers), prompt - 1), -1)
        row, step = torch.nonzero(self._choice[answers][:, : longest + 1], as_tuple=True)
        next_step = tree.paths[answers][row, step + 1]
        return AnswerTexts(
            input_ids=input_ids,
            nodes_at=torch.cat([filler, nodes_at], dim=1),
            row=row,
            position=step + prompt - 1,
            node=paths[row, step],
            child=next_step,
        )

    def choices(
        self, hidden: Tensor, nodes: Tensor, head: LogitHead, advice: Advice | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of all children of ``nodes`` [Q], from hidden states [Q, D], in one flat list.

        Returns (rows, children, log_p): for each candidate its row in Q, its node, its log-probability.
        advice: changes the children's logits.
        """
        tree = self.tree
        rows, children = tree.children(nodes)
        if self.normalization == "catalogue":
            logits = head(hidden, tree.vocabulary).float()[rows, tree.column[children]]
            logits = logits if advice is None else advice(logits, nodes, rows, children)
            return rows, children, segment_log_softmax(logits, rows, len(nodes))
        logits, tokens = head(hidden).float(), tree.token[children]
        if advice is not None:
            advised = advice(logits[rows, tokens], nodes, rows, children)
            logits = logits.index_put((rows, tokens), advised)
        return rows, children, torch.log_softmax(logits, dim=-1)[rows, tokens]

    def chosen(self, log_p: Tensor, children: Tensor, rows: Tensor, child: Tensor) -> Tensor:
        """Picks each choice's own child out of the flat list of ``choices``: [Q]."""
        hit = children == child[rows]
        return log_p[hit]


class LogitHead:
    """The LM's output layer, whole or for a few tokens only.

    Soft-capped (Gemma 2 and 3) and scaled logits are reproduced; ``model.check_head`` compares with the LM's own
    forward pass. output: the layer, or what finds it.
    """

    def __init__(
        self,
        output: torch.nn.Module | Callable[[], torch.nn.Module],
        softcap: float | None,
        scale: float = 1.0,
    ):
        self._output = output
        self.softcap = softcap
        self.scale = scale
        self._rows: tuple[Tensor, tuple[int, int], Tensor, Tensor | None] | None = None

    @classmethod
    def of(cls, lm: PreTrainedModel) -> LogitHead:
        """The head that an LM has at each call: resizing its vocabulary puts another one in its place."""
        config = lm.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
        scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
        tied_scaled = config.model_type in ("umt5", "switch_transformers") and config.tie_word_embeddings
        if tied_scaled or getattr(config, "scale_decoder_outputs", False):  # the T5 family
            scale = config.d_model**-0.5
        return cls(lm.get_output_embeddings, getattr(config, "final_logit_softcapping", None), scale)  # type: ignore[arg-type]

    @property
    def output(self) -> torch.nn.Module:
        """The LM's output layer."""
        return self._output if isinstance(self._output, torch.nn.Module) else self._output()

    def __call__(self, hidden: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Logits [..., V] of hidden states [..., D], or [..., C] for ``tokens`` [C] only."""
        output = self.output
        weight: Tensor = output.weight  # type: ignore[assignment]
        bias: Tensor | None = getattr(output, "bias", None)
        if tokens is not None:
            weight, bias = self._picked(weight, bias, tokens)
        logits = torch.nn.functional.linear(hidden, weight, bias) * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def _picked(self, weight: Tensor, bias: Tensor | None, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """The rows of ``tokens``; kept for the next call unless they learn or have changed since."""
        if weight.requires_grad:
            return weight[tokens], None if bias is None else bias[tokens]
        state = (weight.data_ptr(), weight._version)
        if self._rows is None or self._rows[0] is not tokens or self._rows[1] != state:
            self._rows = (tokens, state, weight[tokens], None if bias is None else bias[tokens])
        return self._rows[2], self._rows[3]
