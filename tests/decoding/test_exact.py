"""Scores over the shared prefix tree against one-by-one scoring, and how much is read for them."""

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from userllm.contextual import TextInLM
from userllm.decoding.answers import ClosedAnswers, LogitHead
from userllm.decoding.exact import score_answers
from userllm.decoding.prefix_tree import PrefixTree

END, WIDTH = 5, 7
answer_sets = st.lists(
    st.lists(st.integers(0, 4), max_size=5).map(lambda tokens: (*tokens, END)),
    min_size=1,
    max_size=20,
    unique=True,
)


def hidden_of(row):
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(hash(row) % 2**31))


@dataclass
class TableLM:
    """Hidden states that are a function of (user, text so far). ``read`` lists every text advanced, over all forks."""

    users: int
    rows: list = field(default_factory=list)
    read: list = field(default_factory=list)
    largest: list = field(default_factory=lambda: [0])

    def start(self, prompt_ids):
        self.rows = [(user, ()) for user in range(self.users)]
        return torch.stack([hidden_of(row) for row in self.rows])

    def advance(self, tokens, nodes, parents):
        self.rows = [
            (self.rows[parent][0], (*self.rows[parent][1], token))
            for token, parent in zip(tokens.tolist(), parents.tolist(), strict=True)
        ]
        each = len(self.rows) // self.users
        assert [user for user, _ in self.rows] == [row // each for row in range(len(self.rows))]
        self.read += self.rows
        self.largest[0] = max(self.largest[0], len(self.rows))
        return torch.stack([hidden_of(row) for row in self.rows])

    def fork(self):
        return TableLM(self.users, list(self.rows), self.read, self.largest)


def head_of(width, vocabulary):
    output = nn.Linear(width, vocabulary).requires_grad_(False)
    for weight in (output.weight, output.bias):
        weight.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(4))
    return LogitHead(output, None)


def one_by_one(answers, user, tokens, head, normalization):
    """Log-likelihood of one answer, token by token."""
    score = 0.0
    for place, token in enumerate(tokens):
        logits = head(hidden_of((user, tokens[:place])))
        if normalization == "catalogue":
            allowed = sorted({a[place] for a in answers if a[:place] == tokens[:place]})
            score += float(torch.log_softmax(logits[allowed], 0)[allowed.index(token)])
        else:
            score += float(torch.log_softmax(logits, 0)[token])
    return score


def texts_with_a_choice(answers, asked, normalization):
    """What has to be read: beginnings of asked answers, without the empty one, that come before their last choice."""
    needed = set()
    for tokens in asked:
        least = 1 if normalization == "vocabulary" else 2
        choices = [
            n
            for n in range(len(tokens))
            if len({a[n] for a in answers if a[:n] == tokens[:n] and len(a) > n}) >= least
        ]
        needed |= {tokens[:n] for n in range(1, max(choices, default=0) + 1)}
    return needed


@given(
    answer_sets,
    st.data(),
    st.integers(1, 3),
    st.integers(1, 9),
    st.sampled_from(["catalogue", "vocabulary"]),
)
def test_any_answers_in_any_blocks(answers, data, users, block, normalization):
    asked = data.draw(st.lists(st.integers(0, len(answers) - 1), max_size=8))
    closed = ClosedAnswers(torch.tensor([0, 1]), PrefixTree.from_tokens(answers), normalization)
    head, table = head_of(WIDTH, END + 1), TableLM(users)
    found = score_answers(table, closed, head, users, torch.tensor(asked, dtype=torch.long), block)
    expected = [
        [one_by_one(answers, user, answers[n], head, normalization) for n in asked] for user in range(users)
    ]
    torch.testing.assert_close(found, torch.tensor(expected).view(users, len(asked)), atol=1e-4, rtol=1e-4)
    # every beginning once per user, and no more than a block at a time
    needed = texts_with_a_choice(answers, [answers[n] for n in asked], normalization)
    assert sorted(table.read) == sorted((user, text) for user in range(users) for text in needed)
    assert table.largest[0] <= max(block, users)


@pytest.mark.parametrize(
    ("architecture", "normalization", "attend"),
    [
        *((name, "catalogue", attend) for name in ("llama", "gemma3") for attend in ("text", "answer")),
        ("gpt2", "catalogue", "answer"),
        *(
            pytest.param(name, "catalogue", "answer", marks=pytest.mark.slow)
            for name in ("qwen3", "opt", "gpt_neox", "phi3")
        ),
        ("llama", "vocabulary", "answer"),
        pytest.param("gemma3", "vocabulary", "text", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_the_same_as_one_by_one_in_a_language_model(
    make_model, histories, architecture, normalization, attend
):
    model = make_model(architecture, normalization=normalization, attend=attend)
    with torch.no_grad():
        users = model.context(histories)
    for task, blocks in (("next_item", (7, 256)), ("favorite_genre", (1,))):
        each = [
            model.answer_log_likelihood(task, torch.full((3,), n), users).detach()
            for n in range(len(model.answers[task]))
        ]
        expected = torch.stack(each, dim=1)
        nobody = model.all_log_likelihoods(task, None)[None]
        some = torch.tensor([len(each) - 1, 0, 2, 0])
        for _ in range(2):
            for block in blocks:
                close(model.score_answers(task, users, block=block), expected)
            close(model.score_answers(task, users, some, block=5), expected[:, some])
            model.store_lower_states()
        close(model.score_answers(task, users.select(torch.tensor([1])), some), expected[1:2, some])
        close(model.score_answers(task, None, block=30), nobody)


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)


def test_fewer_tokens_are_read_than_there_are_in_the_answers(make_model, histories, monkeypatch):
    model, rows = make_model(), []
    advance = TextInLM.advance
    monkeypatch.setattr(
        TextInLM, "advance", lambda self, tokens, *rest: rows.append(len(tokens)) or advance(self, tokens, *rest)
    )  # fmt: skip
    with torch.no_grad():
        users = model.context(histories)
    model.score_answers("next_item", users, block=12)
    closed = model.answers["next_item"]
    tree = closed.tree
    read = torch.unique(torch.cat([tree.paths[n, 1 : closed.reach[n] + 1] for n in range(len(closed))]))
    assert sum(rows) == 3 * len(read) < 3 * int(closed.reach.sum())
    assert max(rows) <= 12
