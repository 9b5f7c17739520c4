"""The encoder's ranking beside the LM's: what it adds, and that it stays out of the way where it has no say."""

import pytest
import torch

from userllm.decoding.answers import ClosedAnswers
from userllm.decoding.prefix_tree import NodeMasses, PrefixTree
from userllm.errors import UserError
from userllm.events import UserHistory
from userllm.fusion.catalogue import CatalogueConfig, CatalogueWeights, LikelyItems
from userllm.fusion.history_text import HistoryTextConfig
from userllm.model import UserLLM
from userllm.training.strategy import trainable_parameters

CATALOGUE = CatalogueConfig(tokens=2)
normalizations = pytest.mark.parametrize("normalization", ["catalogue", "vocabulary"])
every_lm = pytest.mark.parametrize("lm", ["tiny-random-llama", "tiny-random-gpt2", "tiny-random-gemma3"])


def opened(make_user_llm, normalization="catalogue", **settings):
    model = make_user_llm(catalogue=CATALOGUE, **settings)
    normalized(model, normalization)
    model.catalogue.encoder.data = torch.tensor([0.5, 0.9])
    return model


def normalized(model, normalization):
    closed = model.answers["next_item"]
    model.answers["next_item"] = ClosedAnswers(closed.prompt_ids, closed.tree, normalization)


def test_the_interpolation_against_a_loop():
    titles = [(3, 4, 9, 2), (3, 5, 2), (3, 5, 6, 2), (7, 2), (3, 4, 8, 2)]
    tree = PrefixTree.from_tokens(titles)
    weights = CatalogueWeights(CatalogueConfig(tokens=2))
    weights.encoder.data = torch.tensor([1.2, 2.0])
    weights.offset.data = torch.tensor([0.1, -0.2])
    p = torch.softmax(2 * torch.randn(2, len(titles)), -1)
    likely = LikelyItems(NodeMasses(tree, p), torch.tensor([True, False])).select(torch.tensor([1, 0]))
    nodes, owners = torch.tensor([0, tree.paths[0, 1], tree.paths[0, 2], 0]), torch.tensor([1, 1, 1, 0])
    rows, children = tree.children(nodes)
    logits = torch.randn(len(children))
    mine = weights(logits, likely, owners, nodes, rows, children)
    for at, (row, child) in enumerate(zip(rows.tolist(), children.tolist(), strict=True)):
        if row == 3:  # nobody's history: the LM alone
            assert mine[at] == logits[at]
            continue
        begun = titles[0][:row]
        below = [n for n, title in enumerate(titles) if title[:row] == begun]
        through = [n for n in below if titles[n][row] == int(tree.token[child])]
        share = sum(p[0, n] for n in through) / sum(p[0, n] for n in below)
        place = min(row, 1)
        expected = logits[at] + weights.encoder[place] * share.log() + weights.offset[place]
        torch.testing.assert_close(mine[at], expected)


@normalizations
@every_lm
def test_at_its_start_it_changes_nothing_and_alone_it_is_the_encoder(
    make_user_llm, stored, lm, normalization
):
    with_it, without = (make_user_llm(lm=lm, catalogue=c) for c in (CATALOGUE, None))
    normalized(with_it, normalization)
    normalized(without, normalization)
    with_it.catalogue.load_state_dict(CatalogueWeights(CATALOGUE).state_dict())
    same = dict(with_it.named_parameters())
    for name, weight in without.named_parameters():
        same[name].data.copy_(weight.data)
    batch, answers = stored.batch([(7, 0, 6), (5, 0, 2)]), torch.tensor([3, 9])

    def said(model):
        with torch.no_grad():
            return model.answer_log_likelihood("next_item", answers, model.context(batch))

    torch.testing.assert_close(said(with_it), said(without), rtol=0, atol=1e-6)
    with_it.catalogue.encoder.data.fill_(1.0)
    assert not torch.allclose(said(with_it), said(without), atol=1e-3)
    if normalization == "catalogue":  # an LM that says nothing leaves the encoder's own distribution
        torch.nn.init.zeros_(with_it.lm.get_output_embeddings().weight)
        with torch.no_grad():
            scores = with_it.encoder.item_scores(
                with_it.encoder(batch)[0][torch.arange(2), batch.lengths - 1]
            )
        encoder = torch.log_softmax(scores, -1)[torch.arange(2), answers]
        torch.testing.assert_close(said(with_it), encoder, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"attend": "text"},
        {"attend": "answer"},
        {"kind": "soft_prompt"},
        {"attend": "answer", "normalization": "vocabulary"},
    ],
)
def test_beam_search_batches_and_the_stored_states_agree(make_user_llm, dataset, stored, settings):
    model = opened(make_user_llm, **settings)
    users = model.context(stored.batch([(7, 0, 6), (5, 0, 2)]))
    exact = model.all_log_likelihoods("next_item", users.select(torch.tensor([1])))
    torch.testing.assert_close(model.score_answers("next_item", users)[1], exact, rtol=1e-4, atol=1e-4)
    found = model.rank_answers("next_item", users, 20, beams=20)
    assert found.answers[1].tolist() == exact.argsort(descending=True)[:20].tolist()
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
    assert model.catalogue.encoder.grad.abs().min() > 0
    assert trainable_parameters(model)["projection"] == sum(
        w.numel() for part in (model.user_tokens, model.catalogue) for w in part.parameters()
    )
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


def test_it_needs_the_encoder(make_user_llm):
    with pytest.raises(UserError, match="hears the encoder"):
        make_user_llm("lora", kind="none", text=HistoryTextConfig(events=2), catalogue=CATALOGUE)
