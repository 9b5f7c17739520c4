"""Every encoder with every fusion, strategy and three architectures: trained a step, saved, loaded, asked again.

An eighteenth of the combinations, in which every value of every switch occurs, is tested by default; all of them by

    pytest tests/model/test_matrix.py -m ""
"""

from itertools import product

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from userllm.fusion.catalogue import CatalogueConfig
from userllm.fusion.cross_attention import CrossAttentionConfig
from userllm.fusion.history_text import HistoryTextConfig
from userllm.fusion.perceiver import PerceiverConfig
from userllm.language_models.pretrained import LanguageModelConfig, load
from userllm.model import UserLLM
from userllm.training.contextualize import ContextualizeConfig, ContextualizedLosses
from userllm.training.examples import ExampleBatches

SMALL = {"heads": 2, "head_width": 8}
FUSIONS = {
    "gated": {},
    "ungated": {"cross_attention": CrossAttentionConfig(**SMALL, gate="none")},
    "mlp": {"projection": "mlp"},
    "perceiver": {"perceiver": PerceiverConfig(latents=3, layers=1, heads=2)},
    "perceiver, stretches": {"perceiver": PerceiverConfig(latents=3, layers=1, heads=2, start="stretches")},
    "catalogue": {"catalogue": CatalogueConfig(tokens=2), "attend": "answer"},
    "long+short": {"text": HistoryTextConfig(events=2)},
    "soft prompt": {"kind": "soft_prompt"},
    "soft prompt, mlp, perceiver": {
        "kind": "soft_prompt",
        "projection": "mlp",
        "perceiver": PerceiverConfig(latents=3, layers=1, heads=2),
    },
    "text prompt": {"kind": "none", "text": HistoryTextConfig(events=3)},
}
ENCODERS = ("autoregressive", "dual", "bert4rec")
STRATEGIES = ("full", "lora", "enc", "proj")
LMS = ("llama", "gpt2", "gemma3")

COMBINATIONS = [
    combination
    for combination in product(ENCODERS, FUSIONS, STRATEGIES, LMS)
    if not (combination[1] == "text prompt" and combination[2] in ("enc", "proj"))  # nothing would learn
]


def by_default(encoder: str, fusion: str, strategy: str, lm: str) -> bool:
    """Whether a combination belongs to the eighteenth: its places, in three different sums, are multiples."""
    e, f = ENCODERS.index(encoder), list(FUSIONS).index(fusion)
    s, a = STRATEGIES.index(strategy), LMS.index(lm)
    return (e + f + a) % 3 == 0 and (f + s + 2 * a + e) % 3 == 0 and (f + s) % 2 == 0


CASES = [
    pytest.param(*c, marks=() if by_default(*c) else pytest.mark.slow, id="-".join(c)) for c in COMBINATIONS
]


def test_the_eighteenth_has_every_value():
    chosen = [c for c in COMBINATIONS if by_default(*c)]
    for place, values in enumerate((ENCODERS, FUSIONS, STRATEGIES, LMS)):
        assert {c[place] for c in chosen} == set(values)
    assert len(chosen) <= len(COMBINATIONS) / 17


@pytest.mark.parametrize(("encoder", "fusion", "strategy", "lm"), CASES)
def test_a_step_a_round_trip(
    make_user_llm, make_encoder, dataset, split, stored, tmp_path, encoder, fusion, strategy, lm
):
    model = make_user_llm(
        strategy,
        f"tiny-random-{lm}",
        encoder=make_encoder(encoder, max_length=8),
        **FUSIONS[fusion],
    )
    config = ContextualizeConfig(histories=3, examples_per_history=2)
    losses = ContextualizedLosses(model).train()
    examples = ExampleBatches(model, dataset, split, stored, config, seed=0).batch(0)
    losses(**examples)["loss"].backward()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.grad is not None:
                weight -= 0.01 * weight.grad.clamp(-1, 1)

    histories = [dataset.history(user) for user in (2, 7)]
    before = model.recommend(histories, 4)
    text = model.eval().generate("A film", histories[1], max_new_tokens=3)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    loaded = UserLLM.from_pretrained(folder)
    after = loaded.recommend(histories, 4)
    for mine, theirs in zip(before, after, strict=True):
        assert [r.item for r in mine] == [r.item for r in theirs]
        assert [r.log_likelihood for r in mine] == pytest.approx([r.log_likelihood for r in theirs], abs=1e-4)
    assert loaded.generate("A film", histories[1], max_new_tokens=3) == text
    assert load_file(folder / "fusion.safetensors").keys() == model.fusion_weights().keys()
    if strategy == "lora":
        base, tokenizer, _ = load(LanguageModelConfig(name=f"tiny-random-{lm}"))
        with_adapter = PeftModel.from_pretrained(base, str(folder / "adapter")).eval()
        ids = torch.tensor([tokenizer("A film")["input_ids"]])
        with torch.no_grad(), loaded.without_user():
            torch.testing.assert_close(
                with_adapter(input_ids=ids).logits, loaded.lm(input_ids=ids).logits, rtol=1e-4, atol=1e-4
            )
