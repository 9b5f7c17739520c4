"""Short trainings of both stages, whole or interrupted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import set_seed

from userllm.data.batches import BatchConfig
from userllm.training import trainer as trainer_module
from userllm.training.contextualize import ContextualizeConfig, contextualize
from userllm.training.pretrain import PretrainConfig, pretrain
from userllm.training.trainer import OptimizationConfig


class Interrupted(Exception):
    """Stands for kill -9: nothing in the package catches it."""


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A with block in which training dies at the checkpoint of ``step``: just before or after it is marked complete."""

    @contextmanager
    def block(step: int, complete: bool = True) -> Iterator[None]:
        original = trainer_module._MarkComplete.on_save

        def on_save(self, args, state, control, **kwargs):
            if state.global_step == step and not complete:
                raise Interrupted
            original(self, args, state, control, **kwargs)
            if state.global_step == step:
                raise Interrupted

        with monkeypatch.context() as patch:
            patch.setattr(trainer_module._MarkComplete, "on_save", on_save)
            with pytest.raises(Interrupted):
                yield

    return block


def optimization(**settings) -> OptimizationConfig:
    return OptimizationConfig(**({"learning_rate": 1e-2, "save_every": 4, "log_every": 2} | settings))


@pytest.fixture
def run_pretrain(make_encoder, dataset, split, stored):
    """Pretrain a small encoder with dropout in a folder; returns it and the log history."""

    def run(folder, seed=0, learning_rate=1e-2, encoder=None, **settings):
        defaults: dict[str, Any] = {
            "epochs": 3, "batch": BatchConfig(events=40), "evaluate_every": 0.5, "patience": 99,
            "optimization": optimization(learning_rate=learning_rate),
        }  # fmt: skip
        encoder = make_encoder(**{"dropout": 0.2} | (encoder or {}))
        set_seed(seed)
        history = pretrain(
            encoder, dataset, split, stored, PretrainConfig(**(defaults | settings)), folder, seed
        )
        return encoder, history

    return run


@pytest.fixture
def run_contextualize(make_user_llm, dataset, split, stored):
    """Contextualise a tiny LM in a folder; returns the model, its weights before, and the log history."""

    def run(folder, strategy="enc", lm="tiny-random-llama", steps=10, decay=0.1, seed=0, **settings):
        model = make_user_llm(strategy, lm, stir=False)
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        config = ContextualizeConfig(
            steps=steps,
            histories=4,
            examples_per_history=2,
            optimization=optimization(weight_decay=decay),
            **settings,
        )
        set_seed(seed)
        history = contextualize(model, dataset, split, stored, config, folder, seed)
        return model, before, history

    return run


@pytest.fixture
def same_weights():
    def check(a: torch.nn.Module, b: torch.nn.Module) -> None:
        first, second = a.state_dict(), b.state_dict()
        assert first.keys() == second.keys()
        different = [name for name in first if not torch.equal(first[name], second[name])]
        assert not different

    return check
