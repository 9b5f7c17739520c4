"""The token trie of a closed set of answers (a catalogue's titles, a field's values).

Nodes are numbered level by level, the root is 0, and the children of a node are adjacent. Leaves are numbered in the
order of their token sequences, so the answers below a node are a range ``low[n] .. high[n]``: an answer-level
distribution becomes a distribution over children by differences of one cumulative sum.

        root --" The"--> 1 --" Matrix"--> 4 ...          forced steps (one child) carry no choice: under
             --" Alien"-> 2 ...                          "catalogue" normalisation their log-probability is 0
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from userllm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class PrefixTree:
    """A trie over N answers; every array is indexed by node unless it says otherwise, all int64.

    Build it with ``from_tokens`` or ``from_texts``.
    """

    token: Tensor
    parent: Tensor
    depth: Tensor
    low: Tensor
    high: Tensor
    child_start: Tensor
    child_count: Tensor
    column: Tensor
    """Column of the node's token in ``vocabulary``."""
    vocabulary: Tensor
    """[C] the LM's ids of all tokens of the trie."""
    order: Tensor
    """[N] answer at each leaf rank."""
    paths: Tensor
    """[N, L + 1] nodes from the root to each answer's end, -1 past it."""

    def __len__(self) -> int:
        return len(self.order)

    @property
    def leaf_rank(self) -> Tensor:
        """[N] rank of each answer among the leaves: the inverse of ``order``."""
        return torch.argsort(self.order)

    def to(self, device: torch.device) -> PrefixTree:
        """The same trie on another device."""
        return PrefixTree(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    @classmethod
    def from_texts(
        cls, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, separator: str = " "
    ) -> PrefixTree:
        """The trie of ``separator + text + end-of-text`` for each text.

        separator: what makes a text's first word one that stands behind the prompt; see ``language_models.word_start``.
        Raises UserError where there is no answer, two answers read alike, or the tokenizer has no end-of-text token.
        """
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer of {tokenizer.name_or_path} has no end-of-text token: answers could not end"
            )
        encoded = (
            tokenizer([separator + text for text in texts], add_special_tokens=False)["input_ids"]
            if texts
            else []
        )
        return cls.from_tokens([[*tokens, tokenizer.eos_token_id] for tokens in encoded], texts)  # type: ignore[misc]

    @classmethod
    def from_tokens(cls, answers: Sequence[Sequence[int]], texts: Sequence[str] | None = None) -> PrefixTree:
        """The trie of token sequences, none of which may be another's beginning (end-of-text sees to that).

        texts: what the UserError calls two answers for which that does not hold; by default their numbers.
        """
        if not answers:
            raise UserError("the catalogue of answers is empty: there is nothing to choose from")
        longest = max(map(len, answers))
        matrix = np.full((len(answers), max(longest, 1)), -1, dtype=np.int64)
        for row, tokens in enumerate(answers):
            matrix[row, : len(tokens)] = tokens
        order = np.lexsort(matrix.T[::-1])
        matrix = matrix[order]
        lengths = (matrix >= 0).sum(1)
        same = np.cumprod(matrix[1:] == matrix[:-1], axis=1).sum(
            1
        )  # common prefix with the row before, padding included
        shared = np.minimum(same, lengths[:-1])
        clash = np.flatnonzero(shared >= np.minimum(lengths[1:], lengths[:-1]))
        if len(clash):
            a, b = sorted((int(order[clash[0]]), int(order[clash[0] + 1])))
            names = f"{a} and {b}" if texts is None else f"{texts[a]!r} and {texts[b]!r}"
            raise UserError(
                f"the answers {names} read alike to the language model, and every answer needs a text of its own: "
                "rename one in the dataset, or take a language model whose tokenizer tells them apart"
            )
        shared = np.concatenate([[-1], shared])

        count, rows = len(answers), np.arange(len(answers))
        token, parent, depth, low = [np.array([-1])], [np.array([-1])], [np.array([0])], [np.array([0])]
        high = [np.array([count])]
        paths = np.full((count, longest + 1), -1, dtype=np.int64)
        paths[:, 0] = 0
        nodes = 1
        for level in range(1, longest + 1):
            alive = lengths >= level
            start = np.flatnonzero(alive & (shared < level))
            ids = nodes + np.arange(len(start))
            # a leaf belongs to the latest node started at or before it on this level
            owner = np.searchsorted(start, rows, side="right") - 1
            paths[alive, level] = ids[owner[alive]]
            sizes = np.bincount(owner[alive], minlength=len(start))
            token.append(matrix[start, level - 1])
            parent.append(paths[start, level - 1])
            depth.append(np.full(len(start), level))
            low.append(start)
            high.append(start + sizes)
            nodes += len(start)
        parents = np.concatenate(parent)
        child_count = np.bincount(parents[1:], minlength=nodes)
        child_start = np.searchsorted(parents[1:], np.arange(nodes)) + 1
        tokens_by_node = np.concatenate(token)
        vocabulary, column = np.unique(tokens_by_node[1:], return_inverse=True)
        by_answer = np.empty_like(paths)
        by_answer[order] = paths
        arrays = {
            "token": tokens_by_node,
            "parent": parents,
            "depth": np.concatenate(depth),
            "low": np.concatenate(low),
            "high": np.concatenate(high),
            "child_start": child_start,
            "child_count": child_count,
            "column": np.concatenate([[0], column]),
            "vocabulary": vocabulary,
            "order": order,
            "paths": by_answer,
        }
        return cls(
            **{name: torch.from_numpy(np.ascontiguousarray(a, dtype=np.int64)) for name, a in arrays.items()}
        )

    def children(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """All children of ``nodes`` [P] in one flat list: for each, the row in ``nodes`` and the child node.

        A node of -1 (an inactive beam) has no children.
        """
        counts = torch.where(nodes >= 0, self.child_count[nodes.clamp_min(0)], 0)
        rows = torch.repeat_interleave(torch.arange(len(nodes), device=nodes.device), counts)
        first = torch.cumsum(counts, 0) - counts
        within = torch.arange(len(rows), device=nodes.device) - first[rows]
        return rows, self.child_start[nodes[rows]] + within

    def answer_tokens(self) -> Tensor:
        """Token ids of each answer's text, [N, longest], -1 behind its end."""
        nodes = self.paths[:, 1:]
        return torch.where(nodes >= 0, self.token[nodes.clamp_min(0)], -1)

    def is_single(self, nodes: Tensor) -> Tensor:
        """Whether exactly one answer lies below each node."""
        return self.high[nodes] - self.low[nodes] == 1


class NodeMasses:
    """B distributions over the answers [B, N], as probabilities of nodes: differences of one cumulative sum.

    The sum is float64, since the children of a rare node are small differences of it.
    """

    def __init__(self, tree: PrefixTree, probabilities: Tensor):
        self.tree = tree
        ranked = torch.cumsum(probabilities[:, tree.order].double(), dim=1)
        self._below = torch.cat([torch.zeros_like(ranked[:, :1]), ranked], dim=1)

    def __len__(self) -> int:
        return len(self._below)

    def select(self, users: Tensor) -> NodeMasses:
        """Some of the distributions, in the order given."""
        picked = copy.copy(self)
        picked._below = self._below[users]
        return picked

    def shares(self, owners: Tensor, nodes: Tensor, rows: Tensor, children: Tensor) -> Tensor:
        """Each child's share of its node's probability, float64, 0 where the node has none.

        owners [Q]: whose distribution; nodes [Q]; and a flat list of children with their rows in Q, as
        ``tree.children`` gives it.
        """
        whole = self._of(owners, nodes)[rows]
        return self._of(owners[rows], children) / whole.clamp_min(1e-30)

    def _of(self, owners: Tensor, nodes: Tensor) -> Tensor:
        return self._below[owners, self.tree.high[nodes]] - self._below[owners, self.tree.low[nodes]]


def segment_log_softmax(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """Log-softmax within the segments of a flat list: values [Q], rows [Q] in 0..count-1 -> [Q], differentiable."""
    top = torch.full((count,), -torch.inf, dtype=values.dtype, device=values.device)
    top = top.scatter_reduce(0, rows, values.detach(), "amax")
    shifted = values - top[rows]
    total = torch.zeros(count, dtype=values.dtype, device=values.device).index_add(0, rows, shifted.exp())
    return shifted - total.log()[rows]
