"""Stage 1 with the encoder's other settings."""

import pytest
import torch

from userllm.data.batches import BatchConfig
from userllm.data.collation import StoredHistories
from userllm.data.vocabulary import Vocabulary
from userllm.encoders import AutoregressiveConfig
from userllm.model import encoder_for
from userllm.training.pretrain import PretrainConfig, pretrain, training_counts
from userllm.training.trainer import set_seed


@pytest.mark.parametrize(
    "settings",
    [
        {"positions": "relative_time", "feed_forward_kind": "swiglu", "loss_precision": "bfloat16"},
        {
            "positions": "rotary",
            "norm": "post",
            "item_loss": "sampled",
            "negatives": 6,
            "proposal": "popularity",
        },
        {"count_from": "end", "item_loss": "gbce", "negatives": 6, "field_weights": {"time_gap": 0}},
    ],
)
def test_an_encoder_with_other_settings_is_trained(dataset, split, tmp_path, settings):
    stored = StoredHistories(dataset, Vocabulary.from_dataset(dataset, ("item", "rating", "time_gap")))
    set_seed(0)
    sizes = {"layers": 1, "width": 16, "heads": 2, "feed_forward": 32, "item_width": 16, "max_length": 12}
    encoder = encoder_for(stored.collator.vocabulary, AutoregressiveConfig(**(sizes | settings)))
    before = {name: weight.clone() for name, weight in encoder.state_dict().items()}
    config = PretrainConfig(epochs=2, batch=BatchConfig(events=40), recent=8)
    history = pretrain(encoder, dataset, split, stored, config, tmp_path / "pretrain", 0)
    assert any("eval_recall@10" in entry for entry in history)
    assert all(weight.isfinite().all() for weight in encoder.state_dict().values())
    heads = {name for name in before if settings.get("field_weights") and "heads.time_gap" in name}
    assert heads == {
        name for name, weight in encoder.state_dict().items() if torch.equal(weight, before[name])
    }
    if encoder.needs_frequencies:
        assert torch.equal(encoder.item_loss.frequencies, training_counts(stored, split)["item"][2:].float())
