"""Beam search on random tries with a language model that is a table: exact against enumeration."""

import copy
from dataclasses import dataclass, field
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from userllm.decoding.answers import ClosedAnswers, LogitHead
from userllm.decoding.beam_search import search_answers, search_free
from userllm.decoding.prefix_tree import NodeMasses, PrefixTree

END, WIDTH = 5, 7
answer_sets = st.lists(
    st.lists(st.integers(0, 4), max_size=4).map(lambda tokens: (*tokens, END)),
    min_size=1,
    max_size=14,
    unique=True,
)


@dataclass
class TableLM:
    """Hidden states drawn once per (user, text so far); texts are advanced as the real LM's are."""

    users: int
    seen: dict = field(default_factory=dict)
    rows: list = field(default_factory=list)

    def hidden(self, row):
        if row not in self.seen:
            generator = torch.Generator().manual_seed(hash(row) % 2**31)
            self.seen[row] = torch.randn(WIDTH, generator=generator)
        return self.seen[row]

    def start(self, prompt_ids):
        self.rows = [(user, ()) for user in range(self.users)]
        return torch.stack([self.hidden(row) for row in self.rows])

    def advance(self, tokens, nodes, parents):
        assert len(tokens) == len(nodes) == len(parents)
        each = len(tokens) // self.users
        before = self.rows
        self.rows = [
            (before[parent][0], (*before[parent][1], token))
            for token, parent in zip(tokens.tolist(), parents.tolist(), strict=True)
        ]
        assert [user for user, _ in self.rows] == [row // each for row in range(len(tokens))]
        return torch.stack([self.hidden(row) for row in self.rows])


def make_head(seed=0):
    generator = torch.Generator().manual_seed(seed)
    output = nn.Linear(WIDTH, END + 1)
    for weight in (output.weight, output.bias):
        weight.data = torch.randn(weight.shape, generator=generator)
    return LogitHead(output.requires_grad_(False), None)


def enumerated(answers, users, head, normalization):
    """Log-likelihood of every answer for every user, token by token."""
    table, scores = TableLM(users), torch.zeros(users, len(answers))
    for user, (number, tokens) in product(range(users), enumerate(answers)):
        for place, token in enumerate(tokens):
            logits = head(table.hidden((user, tokens[:place])))
            if normalization == "catalogue":
                allowed = sorted({a[place] for a in answers if a[:place] == tokens[:place]})
                log_p = torch.log_softmax(logits[allowed], 0)[allowed.index(token)]
            else:
                log_p = torch.log_softmax(logits, 0)[token]
            scores[user, number] += log_p
    return scores


def search(answers, users, normalization, k, beams=None, excluded=None):
    closed = ClosedAnswers(torch.tensor([0, 1]), PrefixTree.from_tokens(answers), normalization)
    head = make_head()
    return search_answers(TableLM(users), closed, head, users, k, beams, excluded), enumerated(
        answers, users, head, normalization
    )


@given(answer_sets, st.integers(1, 3), st.sampled_from(["catalogue", "vocabulary"]))
def test_wide_enough_it_is_the_exhaustive_ranking(answers, users, normalization):
    found, scores = search(answers, users, normalization, k=len(answers), beams=100)
    expected = scores.sort(dim=1, descending=True).values
    torch.testing.assert_close(found.scores, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scores.gather(1, found.answers), expected, atol=1e-4, rtol=1e-4)
    assert found.answers.sort(1).values.tolist() == [list(range(len(answers)))] * users
    if normalization == "catalogue":
        torch.testing.assert_close(scores.exp().sum(1), torch.ones(users))


@given(answer_sets, st.integers(1, 6), st.integers(1, 6), st.sampled_from(["catalogue", "vocabulary"]))
def test_narrow_beams_give_distinct_real_answers_with_true_scores(answers, k, beams, normalization):
    found, scores = search(answers, 2, normalization, k, beams)
    for user in range(2):
        given_ = [a for a in found.answers[user].tolist() if a >= 0]
        assert len(set(given_)) == len(given_)
        assert given_, "at least one answer is always found"
        assert found.answers[user].tolist() == given_ + [-1] * (k - len(given_))
        real = found.scores[user, : len(given_)]
        torch.testing.assert_close(real, scores[user, given_], atol=1e-4, rtol=1e-4)
        assert real.tolist() == sorted(real.tolist(), reverse=True)
        assert torch.isneginf(found.scores[user, len(given_) :]).all()


@given(answer_sets, st.data(), st.sampled_from(["catalogue", "vocabulary"]))
def test_excluded_answers_never_appear_and_others_keep_their_scores(answers, data, normalization):
    flags = st.lists(st.booleans(), min_size=len(answers), max_size=len(answers))
    excluded = torch.tensor([data.draw(flags), data.draw(flags)])
    found, scores = search(answers, 2, normalization, len(answers), 100, excluded)
    allowed = scores.masked_fill(excluded, -torch.inf).sort(dim=1, descending=True).values
    torch.testing.assert_close(found.scores, allowed, atol=1e-4, rtol=1e-4)
    for user in range(2):
        given_ = [a for a in found.answers[user].tolist() if a >= 0]
        assert sorted(given_) == torch.nonzero(~excluded[user])[:, 0].tolist()


@given(answer_sets, st.integers(1, 3))
def test_a_batch_of_users_is_each_user_alone(answers, k):
    together, _ = search(answers, 3, "catalogue", k, 2)
    first, _ = search(answers, 1, "catalogue", k, 2)
    assert torch.equal(together.answers[:1], first.answers)
    torch.testing.assert_close(together.scores[:1], first.scores)


@pytest.mark.parametrize("normalization", ["catalogue", "vocabulary"])
def test_a_single_answer(normalization):
    answers = [(3, 1, END)]
    found, scores = search(answers, 2, normalization, k=3)
    assert found.answers.tolist() == [[0, -1, -1]] * 2
    torch.testing.assert_close(found.scores[:, :1], scores)
    found, _ = search(answers, 2, normalization, 1, None, torch.tensor([[True], [False]]))
    assert found.answers.tolist() == [[-1], [0]]


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("k", [1, 2, 500])
def test_unconstrained_search_on_a_tiny_vocabulary(steps, k):
    """With as many beams as texts it is enumeration; with fewer its scores are still those of its texts."""
    head, table = make_head(3), TableLM(2)
    texts = [t for n in range(1, steps + 1) for t in product(range(END + 1), repeat=n)]
    texts = [t for t in texts if END not in t[:-1] and (t[-1] == END or len(t) == steps)]

    def score(user, text):
        return float(
            sum(torch.log_softmax(head(table.hidden((user, text[:i]))), 0)[t] for i, t in enumerate(text))
        )

    k = min(k, len(texts))
    sequences, scores = search_free(TableLM(2), torch.tensor([0]), head, 2, k, END, steps)
    for user in range(2):
        texts_found = [tuple(s.tolist()) for s in sequences[user]]
        cut = [t[: t.index(END) + 1] if END in t else t for t in texts_found]
        assert len(set(cut)) == k
        expected = [score(user, t) for t in cut]
        assert scores[user].tolist() == pytest.approx(expected, abs=1e-4)
        if k == len(texts):
            assert expected == pytest.approx(sorted((score(user, t) for t in texts), reverse=True), abs=1e-4)


def test_choices_have_the_precision_of_float32():
    tree = PrefixTree.from_tokens([(i, END) for i in range(5)])
    closed = ClosedAnswers(torch.tensor([0]), tree, "catalogue")
    output = nn.Linear(WIDTH, END + 1).to(torch.bfloat16).requires_grad_(False)
    hidden = torch.randn(1, WIDTH, dtype=torch.bfloat16)
    _, _, log_p = closed.choices(hidden, torch.tensor([0]), LogitHead(output, None))
    assert log_p.dtype == torch.float32
    assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-5)


def test_the_head_never_answers_from_old_weights():
    output = nn.Linear(WIDTH, 6)
    head, tokens, hidden = LogitHead(output, None), torch.tensor([1, 4]), torch.randn(2, WIDTH)
    for learning in (True, False, False, True, False):
        output.requires_grad_(learning)
        for _ in range(2):
            torch.testing.assert_close(head(hidden, tokens), output(hidden)[:, [1, 4]])
            with torch.no_grad():
                output.weight.add_(torch.randn_like(output.weight))
    capped = LogitHead(output, softcap=2.0, scale=0.5)
    torch.testing.assert_close(capped(hidden), torch.tanh(output(hidden) * 0.5 / 2) * 2)


def test_the_head_is_the_language_models_own_at_each_call(tiny_lm):
    lm, tokenizer = tiny_lm("llama")
    head, hidden = LogitHead.of(lm), torch.randn(2, 32)
    lm.resize_token_embeddings(len(tokenizer) + 8)
    lm.get_output_embeddings().weight.data.normal_()
    assert head.output is lm.get_output_embeddings()
    torch.testing.assert_close(head(hidden), lm.lm_head(hidden))
    other = copy.deepcopy(head)
    other.output.weight.data.zero_()
    assert not other(hidden).any() and head(hidden).all()


def test_a_prompt_is_needed():
    with pytest.raises(ValueError, match="at least one token"):
        ClosedAnswers(torch.tensor([], dtype=torch.long), PrefixTree.from_tokens([(1, END)]))


@given(answer_sets, st.integers(0, 10_000))
def test_a_distribution_over_answers_becomes_one_over_children(answers, seed):
    tree = PrefixTree.from_tokens(answers)
    inner = torch.nonzero(tree.child_count > 0)[:, 0]
    p = torch.rand(len(answers), generator=torch.Generator().manual_seed(seed)) + 0.01
    p = torch.stack([torch.zeros(len(answers)), p / p.sum()])
    rows, children = tree.children(inner)
    masses = NodeMasses(tree, p).shares(torch.ones_like(inner), inner, rows, children)
    swapped = NodeMasses(tree, p).select(torch.tensor([1, 0]))
    assert torch.equal(swapped.shares(torch.zeros_like(inner), inner, rows, children), masses)
    assert not swapped.shares(torch.ones_like(inner), inner, rows, children).any()
    for row, child, mass in zip(rows.tolist(), children.tolist(), masses.tolist(), strict=True):
        below = tree.order[tree.low[child] : tree.high[child]]
        around = tree.order[tree.low[inner[row]] : tree.high[inner[row]]]
        assert mass == pytest.approx(float(p[1, below].sum() / p[1, around].sum()), abs=1e-5)


@given(answer_sets, st.data(), st.integers(1, 5), st.sampled_from(["catalogue", "vocabulary"]))
def test_no_beam_is_spent_on_what_leads_to_excluded_answers_alone(answers, data, k, normalization):
    flags = st.lists(st.booleans(), min_size=len(answers), max_size=len(answers))
    excluded = torch.tensor([data.draw(flags), data.draw(flags)])
    found, _ = search(answers, 2, normalization, k, k, excluded)
    assert (found.answers >= 0).sum(1).tolist() == (~excluded).sum(1).clamp(max=k).tolist()
