"""Items that training may not know are no wrong answers of stage 1's loss."""

import pytest
import torch
from torch.nn import functional as F

from userllm.data.batches import BatchConfig
from userllm.data.collation import StoredHistories
from userllm.data.splits import SplitConfig
from userllm.data.unseen_items import apart, unseen_items
from userllm.training.pretrain import PretrainConfig, pretrain, training_counts

KINDS = [
    ("autoregressive", {}),
    ("autoregressive", {"item_loss": "sampled", "negatives": 6}),
    ("autoregressive", {"item_loss": "sampled", "negatives": 6, "proposal": "popularity"}),
    ("autoregressive", {"item_loss": "gbce", "negatives": 6}),
    ("bert4rec", {"hidden_share": 0.5}),
    ("dual", {"negatives": "catalogue"}),
    ("dual", {"negatives": "batch"}),
    ("dual", {"negatives": "mixed", "drawn_negatives": 5}),
]


def unread(batch):
    """Without the items of the inputs, so that gradients at the table are those of the loss alone."""
    inputs = batch["inputs"]
    inputs.fields["item"] = inputs.fields["item"].clamp_max(1)
    return batch


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_the_others_are_not_pushed_away(make_encoder, stored, split, kind, settings):
    batch = unread(stored.next_events([(7, 0, 9), (6, 0, 11)]))
    targets = batch["targets"].fields["item"][batch["targets"].mask] - 2
    answers = torch.unique(torch.cat([targets, torch.tensor([0, 1, 2])]))
    others = torch.tensor(sorted(set(range(20)) - set(answers.tolist())))
    assert len(others) > 2
    table = "label_tower.table.weight" if kind == "dual" else "features.tables.item.weight"
    gradients = []
    for chosen in (None, answers):
        encoder = make_encoder(kind, heads=4, **settings).train()
        if chosen is not None:
            encoder.choose_among(chosen)
        if encoder.needs_frequencies:
            encoder.use_frequencies(training_counts(stored, split))
        total = sum(encoder.next_event_losses(**batch)["item"] for _ in range(20))
        (gradient,) = torch.autograd.grad(total, [encoder.get_parameter(table)])
        gradients.append(gradient[0 if kind == "dual" else 2 :])
    if (
        settings.get("negatives") != "batch"
    ):  # there the others' labels of the batch are all wrong answers anyway
        assert (gradients[0][others] != 0).any()
    assert (gradients[1][others] == 0).all()
    assert (gradients[1][answers] != 0).any()


def test_the_loss_is_the_cross_entropy_among_the_answers(make_encoder, stored):
    batch = stored.next_events([(7, 0, 9), (5, 0, 4)])
    targets = batch["targets"].fields["item"][batch["targets"].mask] - 2
    answers = torch.unique(torch.cat([targets, torch.tensor([4, 9])]))
    encoder = make_encoder()
    scores = encoder.item_scores(encoder(batch["inputs"])[0][batch["targets"].mask])
    place = {int(item): column for column, item in enumerate(answers)}
    expected = F.cross_entropy(scores[:, answers], torch.tensor([place[int(t)] for t in targets]))
    encoder.choose_among(answers)
    torch.testing.assert_close(encoder.next_event_losses(**batch)["item"], expected)


def test_stage_1_of_the_split_of_unseen_items_leaves_them_as_they_are(
    make_encoder, dataset, vocabulary, tmp_path
):
    moved = apart(dataset, 0.4, tmp_path / "apart")
    split = SplitConfig("unseen_items", min_events=3, unseen=0.4).build(moved)
    secret = torch.from_numpy(unseen_items(moved, 0.4))
    encoder = make_encoder()
    before = encoder.features.table("item").detach().clone()
    config = PretrainConfig(epochs=2, batch=BatchConfig(events=40))
    pretrain(encoder, moved, split, StoredHistories(moved, vocabulary), config, tmp_path / "run", seed=0)
    changed = (encoder.features.table("item") != before).any(1)
    assert not changed[secret].any()
    assert changed[~secret].all()


def test_other_splits_keep_all_items(dataset, split):
    assert split.answers(dataset) is None
