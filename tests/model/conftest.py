"""Whole models around tiny-random language models, as the pipeline builds them."""

from collections.abc import Callable, Iterator

import pytest
import torch

from userllm.fusion.cross_attention import CrossAttentionConfig
from userllm.language_models.adapter import Adapter, LoraConfig
from userllm.language_models.pretrained import LanguageModelConfig, load
from userllm.model import FusionConfig, UserLLM
from userllm.tasks import TaskConfig, build_task
from userllm.training.strategy import apply_strategy

TASKS = {
    "next_item": TaskConfig(prompt="The next movie this user will watch is"),
    "favorite_genre": TaskConfig(kind="favorite_category", prompt="This user's favorite genre is"),
}


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("USERLLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def make_user_llm(dataset, stored, make_encoder) -> Callable[..., UserLLM]:
    """A model as if trained with a strategy: every weight it trains is moved a little, and gates are open."""

    def make(strategy="enc", lm="tiny-random-llama", dtype="float32", max_length=8, seed=0, **fusion) -> UserLLM:
        base, tokenizer, reference = load(LanguageModelConfig(name=lm, dtype=dtype))
        torch.manual_seed(seed)
        adapter = Adapter.add(base, LoraConfig(rank=2)) if strategy == "lora" else None
        settings = {"layers": "last:2", "events": 5, "cross_attention": CrossAttentionConfig(heads=2, head_width=8)}
        model = UserLLM(
            base,
            tokenizer,
            make_encoder(max_length=max_length),
            FusionConfig(**(settings | fusion)),
            {name: build_task(name, task, dataset.items) for name, task in TASKS.items()},
            stored.collator,
            reference,
            strategy,
            adapter,
        )
        apply_strategy(model, strategy, adapter)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight.add_(torch.randn_like(weight), alpha=0.03)
            for block in model.attachment.blocks.values():
                if block.gate is not None:
                    block.gate.fill_(0.6)
        return model.eval()

    return make
