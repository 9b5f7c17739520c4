"""What most rooms' tests need: a small catalogue with awkward titles, a dataset over it, tiny contextualised LMs."""

from __future__ import annotations

import gc
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import settings
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from userllm.contextual import ContextualLM
from userllm.data.collation import StoredHistories
from userllm.data.sources.movielens import FIELDS
from userllm.data.splits import Split, SplitConfig
from userllm.data.store import Dataset, Source, write_dataset
from userllm.data.vocabulary import Vocabulary
from userllm.encoders import UserEncoder, encoder_config_class
from userllm.events import HistoryBatch
from userllm.fusion.config import FusionConfig
from userllm.fusion.cross_attention import CrossAttentionConfig
from userllm.fusion.perceiver import PerceiverConfig
from userllm.language_models.adapter import Adapter, LoraConfig
from userllm.language_models.pretrained import LanguageModelConfig, ResolvedLM, load
from userllm.language_models.tiny import SAMPLE_TEXTS, tiny_language_model
from userllm.model import UserLLM, encoder_for
from userllm.tasks import TaskConfig, build_task
from userllm.training.strategy import apply_strategy

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also where tests start processes: tests run side by side
settings.register_profile("patient", deadline=None, max_examples=40)  # a shared machine may be slow
settings.load_profile("patient")

# Shared beginnings, a title that is another's beginning, two items of one title, one whose "[2]" is taken, accents.
TITLES = [
    "Toy Story (1995)", "Toy Story 2 (1999)", "Toy Soldiers (1991)", "Heat (1995)", "GoldenEye (1995)",
    "The Mask (1994)", "The Mask (1994)", "The Mask", "Star Wars: Episode IV - A New Hope (1977)",
    "Star Wars: Episode V - The Empire Strikes Back (1980)", "Star Trek (1979)", "Alien (1979)", "Aliens (1986)",
    "Misérables, Les (1995)", "Seven (1995)", "Se7en (1995)", "The Matrix (1999)", "M (1931)", "Z (1969)",
    "12 Monkeys (1995)",
]  # fmt: skip
GENRES = ["Action", "Comedy", "Drama", "Sci-Fi"]
ARCHITECTURES = ["llama", "qwen3", "gemma3", "gpt2", "opt", "gpt_neox", "phi3"]


def pytest_collection_finish() -> None:
    """What the libraries brought is there to stay: without this every ``gc.collect`` of a training walks it anew."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def catalogue() -> pl.DataFrame:
    """20 items; item 17 has no genre."""
    rng = np.random.default_rng(3)
    return pl.DataFrame(
        {
            "id": [f"m{n}" for n in range(len(TITLES))],
            "title": TITLES,
            "genres": [
                [] if n == 17 else sorted(rng.choice(GENRES, size=1 + n % 2, replace=False).tolist())
                for n in range(len(TITLES))
            ],
            "year": [1970 + n for n in range(len(TITLES))],
        }
    )


@pytest.fixture(scope="session")
def dataset(catalogue: pl.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """24 users with 3 to 19 different items each."""
    rng = np.random.default_rng(5)
    rows = [
        (user, item, 1000 + 10 * step, rng.integers(1, 6))
        for user in range(24)
        for step, item in enumerate(rng.permutation(len(TITLES))[: 3 + (user * 7) % 17])
    ]
    events = pl.DataFrame(rows, schema=["user", "item", "time", "rating"], orient="row")
    return write_dataset(
        tmp_path_factory.mktemp("dataset") / "small",
        events,
        catalogue,
        pl.DataFrame({"id": [f"u{n}" for n in range(24)]}),
        name="small",
        source=Source("made", "a test", "none", "0" * 64, "path"),
        fields=FIELDS,
    )


@pytest.fixture(scope="session")
def split(dataset: Dataset) -> Split:
    return SplitConfig(min_events=5).build(dataset)


@pytest.fixture(scope="session")
def vocabulary(dataset: Dataset) -> Vocabulary:
    return Vocabulary.from_dataset(dataset)


@pytest.fixture(scope="session")
def stored(dataset: Dataset, vocabulary: Vocabulary) -> StoredHistories:
    return StoredHistories(dataset, vocabulary)


@pytest.fixture
def histories(stored: StoredHistories) -> HistoryBatch:
    """Three users: 9 events, 4 events, none."""
    return stored.batch([(7, 0, 9), (5, 0, 4), (8, 0, 0)])


@cache
def _tiny(architecture: str) -> tuple[bytes, PreTrainedTokenizerBase]:
    lm, tokenizer = tiny_language_model(architecture, [*TITLES, *SAMPLE_TEXTS])
    return pickle.dumps(lm), tokenizer  # a fifth of what copy.deepcopy takes


@pytest.fixture(scope="session")
def tiny_lm() -> Callable[[str], tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
    """A fresh copy of a tiny language model (same weights each time), and its tokenizer."""

    def make(architecture: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        pickled, tokenizer = _tiny(architecture)
        return pickle.loads(pickled), tokenizer

    return make


@pytest.fixture(scope="session")
def make_encoder(vocabulary: Vocabulary) -> Callable[..., UserEncoder]:
    """A small encoder of any kind over the small dataset's fields, in evaluation mode."""

    def make(kind: str = "autoregressive", **settings: object) -> UserEncoder:
        sizes: dict[str, object] = {
            "layers": 2, "width": 16, "heads": 2, "feed_forward": 32, "item_width": 16, "field_width": 4,
            "max_length": 12, "dropout": 0.0,
        }  # fmt: skip
        torch.manual_seed(1)
        return encoder_for(vocabulary, encoder_config_class(kind)(**(sizes | settings))).eval()  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def make_model(
    dataset: Dataset,
    make_encoder: Callable[..., UserEncoder],
    tiny_lm: Callable[[str], tuple[PreTrainedModel, PreTrainedTokenizerBase]],
) -> Callable[..., ContextualLM]:
    """A contextualised tiny LM with both tasks. ``stir`` opens the gates, so that the user makes a difference."""

    def make(
        architecture: str = "llama",
        layers: str = "last:2",
        events: int = 6,
        normalization: str = "catalogue",
        perceiver: PerceiverConfig | None = None,
        gate: str = "tanh",
        scale: str = "residual",
        stir: bool = True,
        max_length: int = 12,
        encoder: str = "autoregressive",
        attend: str = "text",
        other_config: tuple[str, dict[str, int]] | None = None,
        prompt: str = "What will the user watch next? A movie that they have not seen before, surely; namely",
    ) -> ContextualLM:
        lm, tokenizer = tiny_lm(architecture)
        if other_config is not None:  # an LM that tiny.py does not know
            torch.manual_seed(3)
            sizes = other_config[1] | {"vocab_size": len(tokenizer)}
            lm = AutoModelForCausalLM.from_config(CONFIG_MAPPING[other_config[0]](**sizes)).eval()
            for weight in lm.parameters():
                weight.data *= 5 if weight.ndim > 1 else 1
        cross = CrossAttentionConfig(heads=2, head_width=8, gate=gate, scale=scale)  # type: ignore[arg-type]
        tasks = {
            "next_item": TaskConfig(prompt=prompt, normalization=normalization),  # type: ignore[arg-type]
            "favorite_genre": TaskConfig(
                kind="favorite_category",
                prompt="This user's favorite genre is",
                normalization=normalization,  # type: ignore[arg-type]
            ),
        }
        torch.manual_seed(2)
        model = ContextualLM(
            lm,
            tokenizer,
            make_encoder(encoder, max_length=max_length),
            FusionConfig(
                layers=layers,
                attend=attend,  # type: ignore[arg-type]
                events=events,
                cross_attention=cross,
                perceiver=perceiver,
            ),
            {name: build_task(name, task, dataset.items) for name, task in tasks.items()},
        ).eval()
        if stir:
            stir_up(model)
        return model

    return make


def stir_up(model: ContextualLM) -> None:
    for block in model.attachment.blocks.values():
        if block.gate is not None:
            block.gate.data.fill_(0.7)
        else:
            torch.nn.init.normal_(block.out.weight, std=0.2)


TASKS = {
    "next_item": TaskConfig(prompt="The next movie this user will watch is"),
    "favorite_genre": TaskConfig(kind="favorite_category", prompt="This user's favorite genre is"),
}


@pytest.fixture(scope="session", autouse=True)
def _model_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("USERLLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@cache
def _loaded(lm: str, dtype: str, products: str) -> tuple[bytes, PreTrainedTokenizerBase, ResolvedLM]:
    base, tokenizer, reference = load(LanguageModelConfig(name=lm, dtype=dtype, products=products))  # type: ignore[arg-type]
    return pickle.dumps(base), tokenizer, reference


@pytest.fixture(scope="session")
def make_user_llm(dataset, stored, make_encoder) -> Callable[..., UserLLM]:
    """A model as if trained with a strategy: every weight it trains is moved a little, and gates are open."""

    def make(
        strategy="enc", lm="tiny-random-llama", dtype="float32", products="float32", max_length=8, seed=0, stir=True,
        encoder=None, more_tasks=None, **fusion
    ) -> UserLLM:  # fmt: skip
        pickled, tokenizer, reference = _loaded(lm, dtype, products)
        base: PreTrainedModel = pickle.loads(pickled)
        torch.manual_seed(seed)
        adapter = Adapter.add(base, LoraConfig(rank=2)) if strategy == "lora" else None
        settings = {
            "layers": "last:2",
            "events": 5,
            "cross_attention": CrossAttentionConfig(heads=2, head_width=8),
        }
        model = UserLLM(
            base,
            tokenizer,
            encoder or make_encoder(max_length=max_length),
            FusionConfig(**(settings | fusion)),
            {name: build_task(name, replace(task), dataset.items) for name, task in TASKS.items()}
            | (more_tasks or {}),
            stored.collator,
            reference,
            strategy,
            adapter,
        )
        apply_strategy(model, strategy, adapter)
        if not stir:
            return model
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight.add_(torch.randn_like(weight), alpha=0.03)
            for block in model.attachment.blocks.values():
                if block.gate is not None:
                    block.gate.fill_(0.6)
        return model.eval()

    return make
