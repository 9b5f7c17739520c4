"""A frozen language model's layers below the first fused one are computed once, not in every training step."""

from __future__ import annotations

import pytest

from userllm.fusion.attach import ReplayLayer
from userllm.training.trainer import StageTrainer


@pytest.mark.parametrize(("strategy", "computed"), [("enc", False), ("proj", False), ("lora", True)])
def test_training_steps_replay_them(run_contextualize, monkeypatch, tmp_path, strategy, computed):
    training, calls = [False], []
    forward, step = ReplayLayer.forward, StageTrainer.training_step

    def counted_forward(self, hidden_states, *args, **kwargs):
        if training[0] and self.slot.replay is None:
            calls.append(self.index)
        return forward(self, hidden_states, *args, **kwargs)

    def marked_step(self, *args, **kwargs):
        training[0] = True
        try:
            return step(self, *args, **kwargs)
        finally:
            training[0] = False

    monkeypatch.setattr(ReplayLayer, "forward", counted_forward)
    monkeypatch.setattr(StageTrainer, "training_step", marked_step)
    model, _, _ = run_contextualize(tmp_path / "contextualize", strategy, steps=3)
    assert model.attachment.first > 0
    assert bool(calls) == computed


def test_moving_a_model_to_where_it_is_keeps_what_it_stored(make_user_llm):
    model = make_user_llm("enc")
    model.store_lower_states()
    stored = dict(model.lower)
    assert stored
    assert model.to("cpu").lower == stored
    assert not model.double().lower
