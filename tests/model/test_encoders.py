"""Any encoder inside the model: each kind of userllm's, and one written by hand that only obeys the protocol."""

import json
import shutil

import pytest
import torch
from torch import nn

from userllm.encoders import UserEncoder
from userllm.errors import UserError
from userllm.fusion.perceiver import PerceiverConfig
from userllm.model import UserLLM
from userllm.training.contextualize import ContextualizeConfig, ContextualizedLosses, ExampleBatches
from userllm.training.strategy import trainable_parameters

KINDS = ["autoregressive", "dual", "bert4rec"]


class RatingMoods(UserEncoder):
    """Two embeddings per user: of the mean rating id, and of the number of events. Nothing else, and no ranking."""

    causal = False
    per_event = False

    def __init__(self, width=16):
        super().__init__()
        self.width, self.max_length = width, 8
        self.mood = nn.Linear(1, width)
        self.size = nn.Linear(1, width)

    def forward(self, batch):
        count = batch.lengths[:, None].float()
        mean = batch.fields["rating"].sum(1, keepdim=True) / count.clamp_min(1)
        both = torch.stack([self.mood(mean), self.size(count)], dim=1)
        return both, batch.mask.any(1, keepdim=True).expand(-1, 2)


@pytest.fixture(params=[*KINDS, "bert4rec, next", "own"])
def encoder(request, make_encoder):
    torch.manual_seed(4)
    if request.param == "own":
        return RatingMoods().eval()
    settings = {"next_embedding": True} if request.param == "bert4rec, next" else {}
    return make_encoder(request.param.split(",")[0], max_length=8, **settings)


@torch.no_grad()
@pytest.mark.parametrize(
    "perceiver",
    [
        None,
        PerceiverConfig(latents=3, layers=2, heads=2),
        PerceiverConfig(latents=3, layers=2, heads=2, start="stretches"),
    ],
)
def test_an_example_knows_its_own_events_only(make_user_llm, stored, encoder, perceiver):
    model = make_user_llm(encoder=encoder, perceiver=perceiver)
    batch = stored.batch([(7, 0, 8), (5, 0, 4), (8, 0, 0)])
    rows, ends = torch.tensor([0, 1, 0, 2, 0]), torch.tensor([8, 4, 3, 0, 7])
    users = model.context(batch, rows, ends)
    assert users.mask.any(1).tolist() == [True, True, True, False, True]
    for place, (user, end) in enumerate([(7, 8), (5, 4), (7, 3), (8, 0), (7, 7)]):
        alone = model.context(stored.batch([(user, 0, end)]))
        torch.testing.assert_close(users.tokens[place], alone.tokens[0], atol=1e-5, rtol=1e-5)
        assert torch.equal(users.mask[place], alone.mask[0])


def test_a_saved_model_answers_as_it_did(make_user_llm, dataset, encoder, tmp_path):
    own = RatingMoods(16) if isinstance(encoder, RatingMoods) else None
    model = make_user_llm(encoder=encoder)
    history = dataset.history(7)
    before, embeddings = model.recommend(history, 5), model.encode(history)
    assert [one.item for one in before] != [one.item for one in model.recommend(dataset.history(2), 5)]
    model.save_pretrained(tmp_path / "model")
    loaded = UserLLM.from_pretrained(tmp_path / "model", encoder=own)
    after = loaded.recommend(history, 5)
    assert [one.item for one in after] == [one.item for one in before]
    assert [one.log_likelihood for one in after] == pytest.approx(
        [one.log_likelihood for one in before], abs=1e-4
    )
    torch.testing.assert_close(loaded.encode(history), embeddings)
    assert type(loaded.encoder) is type(encoder)
    for name, weight in encoder.state_dict().items():
        assert torch.equal(weight, loaded.encoder.state_dict()[name])


def test_an_encoder_with_tied_weights_is_saved(make_user_llm, dataset, tmp_path):
    def tied():
        encoder = RatingMoods(16).eval()
        encoder.size = encoder.mood
        return encoder

    torch.manual_seed(4)
    model = make_user_llm(encoder=tied())
    model.save_pretrained(tmp_path / "model")
    loaded = UserLLM.from_pretrained(tmp_path / "model", encoder=tied())
    assert loaded.encoder.size is loaded.encoder.mood
    torch.testing.assert_close(loaded.encode(dataset.history(7)), model.encode(dataset.history(7)))


@pytest.mark.parametrize("strategy", ["enc", "proj"])
def test_what_learns(make_user_llm, dataset, split, stored, encoder, strategy):
    model = make_user_llm(strategy, encoder=encoder).train()
    frozen = sum(w.numel() for w in encoder.head_parameters())
    whole = sum(w.numel() for w in encoder.parameters())
    assert trainable_parameters(model)["encoder"] == (whole - frozen if strategy == "enc" else 0)
    config = ContextualizeConfig(steps=1, histories=4, examples_per_history=2)
    examples = ExampleBatches(model, dataset, split, stored, config, 0).batch(0)["examples"]
    ContextualizedLosses(model)(examples)["loss"].backward()
    learnt = [w.grad is not None and bool(w.grad.abs().sum() > 0) for w in encoder.parameters()]
    assert any(learnt) == (strategy == "enc")


def test_a_teacher_of_any_kind_that_ranks(make_user_llm, dataset, split, stored, encoder):
    model = make_user_llm(encoder=encoder)
    model.tasks["next_item"].config.teacher = 0.5
    try:
        config = ContextualizeConfig(steps=1)
        examples = ExampleBatches(model, dataset, split, stored, config, 0).batch(0)["examples"]
        losses = ContextualizedLosses(model)
        if not encoder.ranks_items:
            with pytest.raises(UserError, match="RatingMoods cannot rank the catalogue by itself"):
                losses(examples)
            return
        mine = torch.nonzero(examples.task == 0)[:, 0]
        taught = losses._teach(examples.histories, examples, mine)
        for place, example in enumerate(mine.tolist()):
            alone = examples.histories.select(examples.rows[example : example + 1])
            alone = alone.prefixes(examples.ends[example : example + 1])
            with torch.no_grad():
                scores = encoder.next_item_scores(alone, torch.tensor([0]), alone.lengths)[0]
            torch.testing.assert_close(taught[place], torch.softmax(scores, -1), atol=1e-5, rtol=1e-4)
    finally:
        model.tasks["next_item"].config.teacher = 0.0


def test_explaining_needs_an_embedding_per_event(make_user_llm, dataset, encoder):
    model = make_user_llm(encoder=encoder)
    if encoder.per_event:
        attended = model.explain(dataset.history(7, 0, 6))
        assert [a.event for a in attended] == dataset.history(7, 1, 6).events
        assert sum(a.weight for a in attended) == pytest.approx(1, abs=1e-5)
    else:
        with pytest.raises(UserError, match="stand for no single event"):
            model.explain(dataset.history(7))


def test_an_own_encoder_has_to_be_brought_and_to_fit(make_user_llm, make_encoder, tmp_path):
    make_user_llm(encoder=RatingMoods().eval()).save_pretrained(tmp_path / "model")
    load = UserLLM.from_pretrained
    with pytest.raises(UserError, match=r"RatingMoods; build .*from_pretrained\(folder, encoder=\.\.\.\)"):
        load(tmp_path / "model")
    with pytest.raises(
        UserError, match="user embeddings of width 16, those of the RatingMoods given are 32 wide"
    ):
        load(tmp_path / "model", encoder=RatingMoods(32))
    with pytest.raises(UserError, match=r"encoder\.safetensors: blocks.* is absent"):
        load(tmp_path / "model", encoder=make_encoder())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda fields: fields[0]["values"].pop(),
            "21 ids of field 'item', .* trained with 22 ids of field 'item'",
        ),
        (lambda fields: fields[0]["values"].reverse(), "ids stand for other values"),
        (lambda fields: fields.pop(), "no further field, .* 6 ids of field 'genres'"),
    ],
    ids=["fewer values", "another order", "fewer fields"],
)
def test_another_vocabulary_is_refused_with_the_reason(make_user_llm, tmp_path, change, reason):
    make_user_llm().save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "vocabulary.json"
    raw = json.loads(file.read_text())
    change(raw["fields"])
    file.write_text(json.dumps(raw))
    with pytest.raises(UserError, match=rf"vocabulary\.json: .*{reason}"):
        UserLLM.from_pretrained(tmp_path / "model")


def test_another_kinds_weights_are_refused(make_user_llm, make_encoder, tmp_path):
    make_user_llm().save_pretrained(tmp_path / "model")
    make_user_llm(encoder=make_encoder("bert4rec", max_length=8)).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "encoder.safetensors", tmp_path / "model")
    with pytest.raises(UserError, match=r"encoder\.safetensors: .* is absent, .* need"):
        UserLLM.from_pretrained(tmp_path / "model")
