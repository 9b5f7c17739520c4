"""Exact log-likelihoods of many answers at once, over their prefix tree.

Titles that begin alike share the tokens of their beginning: a node of the tree that leads to an asked answer is read
once per user, not once per answer below it. The walk goes down level by level, in blocks of nodes; a level's blocks
wait while everything below the one before them is read. So memory is bounded by the block and the tree's depth, never
by the size of the catalogue.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from userllm.decoding.answers import Advice, ClosedAnswers, LogitHead
from userllm.decoding.beam_search import TextState


class ForkableState(TextState, Protocol):
    """A batch of texts that can be continued in more than one way."""

    def fork(self) -> ForkableState:
        """The same texts once more: to advance one of the two leaves the other as it is."""
        ...


@dataclass
class _Waiting:
    """Nodes [n] to read next, for every user: children of texts in ``state``, which holds ``width`` rows per user.

    rows [n]: each node's text within a user's rows. scores [B, n]: log-likelihood down to and with the node.
    """

    state: ForkableState
    width: int
    rows: Tensor
    nodes: Tensor
    scores: Tensor


@torch.no_grad()
def score_answers(
    state: ForkableState,
    answers: ClosedAnswers,
    head: LogitHead,
    users: int,
    asked: Tensor,
    block: int = 256,
    advice: Advice | None = None,
) -> Tensor:
    """Log-likelihood [B, A], in nats, of answers ``asked`` [A] (any order, repeats allowed) for B = ``users`` users.

    What ``ContextualLM.answer_log_likelihood`` says of each, to float tolerance. block: texts advanced at once (users
    times nodes; at least one node). advice: as in ``search_answers``.
    """
    tree, device = answers.tree, answers.prompt_ids.device
    whole = answers.normalization == "vocabulary"
    wanted, column = torch.unique(asked, return_inverse=True)
    found = torch.zeros(users, len(wanted), device=device)
    if len(wanted) == 0 or (len(tree) == 1 and not whole):
        return found[:, column]
    place = torch.zeros(len(tree), dtype=torch.long, device=device)
    place[wanted] = torch.arange(len(wanted), device=device)
    leads = torch.zeros(len(tree.token), dtype=torch.bool, device=device)
    paths = tree.paths[wanted]
    leads[paths[paths >= 0]] = True
    nodes_at_once = max(1, block // users)
    first_row = torch.arange(users, device=device)[:, None]
    waiting: list[_Waiting] = []

    def choose(state: ForkableState, hidden: Tensor, nodes: Tensor, scores: Tensor) -> None:
        """Score the children of nodes [n] that were just read; those with more choices below them wait their turn."""
        rows, children, log_p = answers.choices(hidden, nodes.repeat(users), head, advice)
        each = len(rows) // users  # every user stands at the same nodes
        rows, children = rows[:each], children[:each]
        scores = scores[:, rows] + log_p.view(users, each)
        ended = tree.child_count[children] == 0 if whole else tree.is_single(children)
        end, go_on = leads[children] & ended, leads[children] & ~ended
        found[:, place[tree.order[tree.low[children[end]]]]] = scores[:, end].to(found)
        if bool(go_on.any()):
            waiting.append(_Waiting(state, len(nodes), rows[go_on], children[go_on], scores[:, go_on]))

    root = torch.zeros(1, dtype=torch.long, device=device)
    choose(state, state.start(answers.prompt_ids), root, torch.zeros(users, 1, device=device))
    while waiting:
        texts = waiting.pop()
        now, later = slice(None, nodes_at_once), slice(nodes_at_once, None)
        state = texts.state
        if len(texts.nodes) > nodes_at_once:
            rest = texts.rows[later], texts.nodes[later], texts.scores[:, later]
            waiting.append(_Waiting(state, texts.width, *rest))
            state = state.fork()
        nodes = texts.nodes[now]
        parents = first_row * texts.width + texts.rows[now]
        hidden = state.advance(tree.token[nodes].repeat(users), nodes.repeat(users), parents.flatten())
        choose(state, hidden, nodes, texts.scores[:, now])
    return found[:, column]
