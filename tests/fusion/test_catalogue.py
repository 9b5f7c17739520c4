"""Attention from the user to the catalogue's titles: what it adds, and that it stays out of the way at gate zero."""

import pytest
import torch

from userllm.decoding.prefix_tree import NodeMasses, PrefixTree
from userllm.errors import UserError
from userllm.events import UserHistory
from userllm.fusion.catalogue import CatalogueBlock, CatalogueConfig, LikelyItems, _separating
from userllm.fusion.history_text import HistoryTextConfig
from userllm.model import UserLLM
from userllm.training.strategy import trainable_parameters

CATALOGUE = CatalogueConfig(least=0.01, tokens=2)
every_lm = pytest.mark.parametrize("lm", ["tiny-random-llama", "tiny-random-gpt2", "tiny-random-gemma3"])


def opened(make_user_llm, **settings):
    model = make_user_llm(catalogue=CATALOGUE, **settings)
    model.attachment.after.gate.data.fill_(0.5)
    model.attachment.after.threshold.data.fill_(4.0)  # an untrained encoder finds no item likely
    return model


def test_what_is_said_at_a_node_against_a_loop():
    table = torch.randn(30, 8)
    titles = [(3, 4, 9, 2), (3, 5, 2), (3, 5, 6, 2), (7, 2), (3, 4, 8, 2)]
    tree = PrefixTree.from_tokens(titles)
    block = CatalogueBlock(CatalogueConfig(least=0.2, tokens=2), tree.answer_tokens(), table)
    block.gate.data = torch.tensor([0.3, 0.6])
    block.threshold.data = torch.tensor([1.2, 2.0])
    p = torch.softmax(2 * torch.randn(2, len(titles)), -1)
    p[1] = 0  # a user without a history
    nodes = torch.tensor([[-1, 0, tree.paths[0, 1], tree.paths[0, 2]]]).repeat(4, 1)  # two rows per user
    nodes[1, 1] = -1
    hidden = torch.randn(4, 4, 8)
    mine = block(hidden, LikelyItems(NodeMasses(tree, p), table), nodes)
    assert torch.equal(mine[2:], hidden[2:]) and torch.equal(mine[nodes < 0], hidden[nodes < 0])
    for row, position in [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3)]:
        begun = titles[0][: position - 1]
        place = min(position - 1, 1)
        below = [n for n, title in enumerate(titles) if title[: len(begun)] == begun]
        said = torch.zeros(8)
        for token in {titles[n][len(begun)] for n in below}:
            share = sum(p[0, n] for n in below if titles[n][len(begun)] == token) / sum(
                p[0, n] for n in below
            )
            weight = torch.relu(share.log() + block.threshold[place])
            said += weight * (table[token] / block.size - block.centres[place])
        size = hidden[row, position].pow(2).mean().sqrt()
        expected = hidden[row, position] + torch.tanh(block.gate[place]) * size * said @ block.maps[place]
        torch.testing.assert_close(mine[row, position], expected, rtol=1e-4, atol=1e-4)


def test_the_map_tells_titles_apart():
    table = torch.randn(50, 12)
    tokens = torch.arange(40)
    to_text, centre = _separating(tokens, table, 1.0)
    rows = table[:40] - centre
    seen = rows @ to_text @ rows.T
    plain = rows @ rows.T

    def contrast(scores):
        own, others = scores.diagonal(), scores[~torch.eye(40, dtype=torch.bool)]
        return float(own.mean() / others.std())

    assert contrast(seen) > 1.15 * contrast(plain)


@every_lm
@pytest.mark.parametrize("attend", ["text", "answer"])
def test_shut_it_changes_nothing_and_open_it_does(make_user_llm, stored, lm, attend):
    with_it, without = (make_user_llm(lm=lm, attend=attend, catalogue=c) for c in (CATALOGUE, None))
    same = dict(with_it.named_parameters())
    for name, weight in without.named_parameters():
        same[name].data.copy_(weight.data)
    with_it.attachment.after.gate.data.zero_()
    batch, answers = stored.batch([(7, 0, 6), (5, 0, 2)]), torch.tensor([3, 9])

    def said(model):
        with torch.no_grad():
            return model.answer_log_likelihood("next_item", answers, model.context(batch))

    assert torch.equal(said(with_it), said(without))
    with_it.attachment.after.gate.data.fill_(0.5)
    with_it.attachment.after.threshold.data.fill_(4.0)
    assert not torch.allclose(said(with_it), said(without), atol=1e-3)


@pytest.mark.parametrize("attend", ["text", "answer"])
def test_beam_search_batches_and_the_stored_states_agree(make_user_llm, dataset, stored, attend):
    model = opened(make_user_llm, attend=attend)
    users = model.context(stored.batch([(7, 0, 6), (5, 0, 2)]))
    exact = model.all_log_likelihoods("next_item", users.select(torch.tensor([1])))
    found = model.rank_answers("next_item", users, 20, beams=20)
    assert found.answers[1].tolist() == exact.argsort(descending=True).tolist()
    model.store_lower_states()
    again = model.rank_answers("next_item", users, 20, beams=20)
    assert torch.allclose(again.scores, found.scores, atol=1e-4)
    histories = [dataset.history(7), UserHistory([]), dataset.history(2, 0, 1)]
    for history, mine in zip(histories, model.recommend(histories, 4), strict=True):
        alone = model.recommend(history, 4)
        assert [r.item for r in alone] == [r.item for r in mine]
        assert [r.log_likelihood for r in alone] == pytest.approx([r.log_likelihood for r in mine], abs=1e-4)


def test_it_learns_is_counted_and_is_saved(make_user_llm, dataset, stored, tmp_path):
    model = opened(make_user_llm)
    users = model.context(stored.batch([(7, 0, 6), (5, 0, 2)]))
    model.answer_log_likelihood("next_item", torch.tensor([3, 9]), users).sum().backward()
    after = model.attachment.after
    assert all(weight.grad is not None for weight in after.parameters())
    assert after.threshold.grad.abs().min() > 0 and after.gate.grad.abs().min() > 0
    blocks = sum(w.numel() for b in model.attachment.blocks.values() for w in b.parameters())
    own = sum(w.numel() for w in after.parameters())
    assert trainable_parameters(model)["cross_attention"] == blocks + own
    model.save_pretrained(tmp_path / "model")
    loaded = UserLLM.from_pretrained(tmp_path / "model")
    history = dataset.history(7)
    assert [r.item for r in loaded.recommend(history, 5)] == [r.item for r in model.recommend(history, 5)]
    assert loaded.generate("A film", history) == model.generate("A film", history)


def test_text_that_names_no_item_is_left_alone(make_user_llm, dataset, stored):
    model, without = opened(make_user_llm), make_user_llm(catalogue=None)
    same = dict(model.named_parameters())
    for name, weight in without.named_parameters():
        weight.data.copy_(same[name].data)
    history, batch, answers = dataset.history(7), stored.batch([(7, 0, 6), (5, 0, 2)]), torch.tensor([0, 1])
    assert model.generate("A film", history) == without.generate("A film", history)
    for task, equal in (("favorite_genre", True), ("next_item", False)):
        with torch.no_grad():
            a, b = (m.answer_log_likelihood(task, answers, m.context(batch)) for m in (model, without))
        assert torch.equal(a, b) == equal


def test_settings_that_do_not_go_together(make_user_llm):
    with pytest.raises(UserError, match="goes with kind cross_attention"):
        make_user_llm(kind="soft_prompt", catalogue=CATALOGUE)
    with pytest.raises(UserError, match="goes with kind cross_attention"):
        make_user_llm("lora", kind="none", text=HistoryTextConfig(events=2), catalogue=CATALOGUE)
