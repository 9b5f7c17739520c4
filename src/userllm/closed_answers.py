"""Answers out of a closed set inside a contextualised language model: how likely each is for a user.

At every node of the answers' prefix tree the LM chooses among the node's children; ``decoding.answers`` says what its
probabilities are normalised over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from userllm.decoding.answers import AnswerTexts
from userllm.decoding.exact import score_answers
from userllm.decoding.prefix_tree import NodeMasses
from userllm.fusion.attach import UserContext
from userllm.text_in_lm import TextInLM

if TYPE_CHECKING:
    from userllm.contextual import ContextualLM


def answer_losses(
    model: ContextualLM,
    task: str,
    answers: Tensor,
    users: UserContext | None,
    teacher: Tensor | None = None,
    together: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Negative log-likelihood [E] of the answers, and the cross-entropy [E] against a teacher's distribution.

    teacher [E, N]: probabilities over answers; along the path to the given answer, the LM's distribution over each
    node's children is compared with the teacher's (ours). Answers are read in groups of like length: most need a
    token or two before they are the only one left, a few need many. together: all in one group, so that the LM is
    called once, whatever the answers are; always so on an accelerator, where a call costs more than its padding.
    """
    closed = model.answers[task]
    nll = torch.zeros(len(answers), device=answers.device)
    taught = torch.zeros_like(nll)
    taught_by = None if teacher is None else NodeMasses(closed.tree, teacher)
    together = together or answers.device.type != "cpu"
    group_of = torch.ceil(torch.log2(closed.reach[answers] + 1.0)).clamp(1, 1 if together else 3)
    for group in torch.unique(group_of):
        part = torch.nonzero(group_of == group)[:, 0]
        mine = users.select(part) if users is not None and len(users) == len(answers) else users
        texts, rows, children, log_p = _choices(model, task, answers[part], mine)
        taken = closed.chosen(log_p, children, rows, texts.child)
        nll = nll.index_add(0, part[texts.row], -taken)
        if taught_by is not None:
            mass = taught_by.shares(part[texts.row], texts.node, rows, children).to(log_p.dtype)
            taught = taught.index_add(0, part[texts.row[rows]], -mass * log_p)
    return nll, None if teacher is None else taught


def scores_of_answers(
    model: ContextualLM, task: str, users: UserContext | None, answers: Tensor | None, block: int
) -> Tensor:
    """Exact log-likelihood [B, A], in nats, of answers [A] (all by default) per user; None: the base LM, B = 1.

    Every node of the answers' prefix tree is read once per user, ``block`` texts at a time; see ``decoding.exact``.
    """
    closed = model.answers[task]
    asked = torch.arange(len(closed), device=closed.prompt_ids.device) if answers is None else answers
    parts: list[UserContext | None] = [None]
    if users is not None:
        everyone = torch.arange(len(users), device=users.tokens.device)
        parts = [users.select(some) for some in everyone.split(block)]
    scores = []
    for some in parts:
        count = 1 if some is None else len(some)
        with torch.no_grad(), model.conditioned_or_not(some):
            state = TextInLM(model, count, task, context=some)
            scores.append(
                score_answers(state, closed, model.head, count, asked, block, model.advice(task, some))
            )
    return torch.cat(scores)


def _choices(
    model: ContextualLM, task: str, answers: Tensor, users: UserContext | None
) -> tuple[AnswerTexts, Tensor, Tensor, Tensor]:
    """Teacher-forced texts of the answers, and the choices along them: rows, children and log-probabilities."""
    closed = model.answers[task]
    texts = closed.texts(answers)
    lower = model.lower.get(task)
    states = None if lower is None else lower.of(texts)
    ids, position, cache, mask = texts.input_ids, texts.position, None, None
    source = model.source_of(task, users, len(ids)) if model.has_encoder else None
    read = len(closed.prompt_ids) - 1
    prefix = None if users is None or model.has_encoder else users.prefix
    if model.reads_ahead and (read > 0 or prefix is not None):
        if prefix is None:
            cache = model.prompt_cache(task, len(answers), states is not None)
        else:
            cache, mask = model.read_prompt(ids[:, :read], users)
        ids, position = ids[:, read:], position - read
        mask = None if mask is None else torch.cat([mask, torch.ones_like(ids, dtype=torch.bool)], dim=1)
        states = None if states is None else states[:, read:]
    elif prefix is not None:
        ids, mask = model.after_prefix(prefix, ids)
        position = position + ids.shape[1] - texts.input_ids.shape[1]
    with model.conditioned_or_not(users):
        hidden = model.hidden(ids, states, cache, mask, source)
    picked = hidden[texts.row, position]
    rows, children, log_p = closed.choices(
        picked, texts.node, model.head, model.advice(task, users, texts.row)
    )
    return texts, rows, children, log_p.float()
