"""A saved model answers as it did, is read by the libraries it borrows from, and refuses what does not fit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from userllm import tensor_file
from userllm.errors import UserError
from userllm.fusion.history_text import HistoryTextConfig
from userllm.fusion.perceiver import PerceiverConfig
from userllm.language_models.pretrained import LanguageModelConfig, load
from userllm.model import UserLLM

VARIANTS = {
    "enc": {},
    "proj": {"strategy": "proj"},
    "lora": {"strategy": "lora"},
    "full": {"strategy": "full"},
    "perceiver": {"perceiver": PerceiverConfig(latents=3, layers=2, heads=2)},
    "perceiver, stretches": {"perceiver": PerceiverConfig(latents=3, layers=1, heads=2, start="stretches")},
    "answer": {"attend": "answer"},
    "bfloat16": {"dtype": "bfloat16"},
    "products": {"products": "bfloat16", "strategy": "lora"},
    "soft": {"kind": "soft_prompt", "projection": "mlp"},
    "mlp": {"projection": "mlp"},
    "text": {"kind": "none", "strategy": "lora", "text": HistoryTextConfig(events=3)},
    "gpt2-lora": {"strategy": "lora", "lm": "tiny-random-gpt2", "layers": "every:2"},
}


class Behaviour:
    """What a model says: texts and choices exactly, numbers to float rounding: that follows where weights lie."""

    def __init__(self, model, dataset):
        histories = [dataset.history(user) for user in (2, 5, 7)]
        lists = model.recommend(histories, 5) + model.recommend(histories, 3, task="favorite_genre")
        flat = [r for answers in lists for r in answers]
        texts = [model.generate("The user likes", one, max_new_tokens=4) for one in [histories[1], None]]
        opaque = model.config.perceiver or model.config.kind != "cross_attention"
        weights = [] if opaque else [a.weight for a in model.explain(histories[2])]
        self.words = [(r.item, r.title) for r in flat], texts
        self.numbers = [
            *(r.log_likelihood for r in flat),
            *weights,
            *model.encode(histories[1]).flatten().tolist(),
            *model.gates.values(),
        ]

    def __eq__(self, other):
        return self.words == other.words and self.numbers == pytest.approx(other.numbers, abs=1e-5)


def behaviour(model, dataset):
    return Behaviour(model, dataset)


@pytest.mark.parametrize("variant", VARIANTS)
def test_save_load_same_answers(make_user_llm, dataset, tmp_path, variant):
    model = make_user_llm(**VARIANTS[variant])
    before = behaviour(model, dataset)
    model.save_pretrained(tmp_path / "model")
    loaded = UserLLM.from_pretrained(tmp_path / "model")
    assert behaviour(loaded, dataset) == before
    assert behaviour(model, dataset) == before, "saving changes nothing"
    assert not loaded.training
    assert not any(weight.requires_grad for weight in loaded.parameters())
    assert (loaded.strategy, loaded.config) == (model.strategy, model.config)
    assert loaded.reference.source == model.reference.source, "where the LM came from, not where it was put"
    if variant in ("lora", "full", "answer"):  # and once more from what was loaded
        loaded.save_pretrained(tmp_path / "again")
        assert behaviour(UserLLM.from_pretrained(tmp_path / "again"), dataset) == before


def test_a_model_made_bfloat16_whose_products_were(make_user_llm, tmp_path):
    model = make_user_llm(products="bfloat16")
    model.lm.to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    assert UserLLM.from_pretrained(tmp_path / "model").lm.dtype == torch.bfloat16


def test_one_folder_with_a_frozen_lm_as_a_reference(make_user_llm, tmp_path):
    model = make_user_llm()
    model.save_pretrained(tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "README.md", "config.json", "encoder.safetensors", "fusion.safetensors", "items.parquet", "vocabulary.json"
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    saved = json.loads((tmp_path / "model" / "config.json").read_text())
    assert saved["lm"]["sha256"] == model.reference.sha256
    weights = load_file(tmp_path / "model" / "fusion.safetensors")
    assert set(weights) == {
        "user_tokens.recency.weight",
        *(f"blocks.{i}.{name}" for i in (2, 3) for name, _ in model.attachment.blocks[i].named_parameters()),
    }
    assert torch.equal(weights["blocks.3.gate"], model.attachment.blocks[3].gate.data)


def test_a_lora_adapter_is_a_plain_peft_folder(make_user_llm, tmp_path):
    model = make_user_llm("lora")
    model.save_pretrained(tmp_path / "model")
    base, tokenizer, _ = load(LanguageModelConfig(name="tiny-random-llama"))
    ids = tokenizer("What will the user watch next?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        plain = base(ids).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "model" / "adapter")(ids).logits
        with model.without_user():
            mine = model.lm(ids).logits
    torch.testing.assert_close(adapted, mine)
    assert not torch.allclose(adapted, plain, atol=1e-3)


def test_a_fully_trained_lm_is_a_plain_folder(make_user_llm, tmp_path):
    model = make_user_llm("full")
    model.save_pretrained(tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model" / "lm")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model" / "lm")
    ids = tokenizer("What will the user watch next?", return_tensors="pt")["input_ids"]
    with torch.no_grad(), model.without_user():
        torch.testing.assert_close(plain(ids).logits, model.lm(ids).logits)


def test_a_model_moves_with_its_folder_and_its_lm(make_user_llm, dataset, tmp_path, monkeypatch):
    base, tokenizer, _ = load(LanguageModelConfig(name="tiny-random-llama"))
    base.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    monkeypatch.chdir(tmp_path)
    model = make_user_llm(lm="./lm")  # loaded once and kept: the name is used in this test alone
    model.save_pretrained("model")
    before = behaviour(model, dataset)
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "model", tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert behaviour(UserLLM.from_pretrained("model"), dataset) == before
    shutil.move(tmp_path / "lm", tmp_path / "lm2")
    with pytest.raises(UserError, match="no such folder"):
        UserLLM.from_pretrained("model")
    assert behaviour(UserLLM.from_pretrained("model", lm=str(tmp_path / "lm2")), dataset) == before


def test_saving_replaces_a_model_and_nothing_else(make_user_llm, dataset, tmp_path, monkeypatch):
    first, second = make_user_llm(), make_user_llm(seed=5)
    folder = tmp_path / "model"
    first.save_pretrained(folder)
    second.save_pretrained(folder)
    assert behaviour(UserLLM.from_pretrained(folder), dataset) == behaviour(second, dataset)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(UserError, match="exists and holds no model"):
        first.save_pretrained(tmp_path / "photos")
    (tmp_path / "photos" / "config.json").write_text("{}")  # somebody else's folder may hold a config.json
    with pytest.raises(UserError, match="exists and holds no model"):
        first.save_pretrained(tmp_path / "photos")
    assert (tmp_path / "photos" / "cat.jpg").exists()
    first.save_pretrained(tmp_path / "empty")

    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(tensor_file, "save_file", full_disk)
    for target in (folder, tmp_path / "new"):
        with pytest.raises(OSError, match="No space"):
            first.save_pretrained(target)
    assert behaviour(UserLLM.from_pretrained(folder), dataset) == behaviour(second, dataset)
    assert not (tmp_path / "new").exists()
    monkeypatch.undo()
    rename = Path.rename

    def not_twice(self, target):
        if Path(target) == folder and "replaced" not in self.parts:
            raise OSError("Device or resource busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", not_twice)
    with pytest.raises(OSError, match="busy"):
        first.save_pretrained(folder)
    assert behaviour(UserLLM.from_pretrained(folder), dataset) == behaviour(second, dataset)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "photos", "empty"}
    behaviour(first, dataset)  # a failed save leaves the model fused


@pytest.fixture
def saved(make_user_llm, tmp_path):
    make_user_llm().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("strategy", ["enc", "lora", "full"])
def test_whoever_may_read_the_rest_may_read_the_weights(make_user_llm, tmp_path, strategy):
    make_user_llm(strategy).save_pretrained(tmp_path / "model")
    usual = (tmp_path / "model" / "config.json").stat().st_mode
    weights = list((tmp_path / "model").rglob("*.safetensors"))
    assert len(weights) == (2 if strategy == "enc" else 3)
    assert {file.stat().st_mode for file in weights} == {usual}


def test_another_lm_is_refused(saved):
    with pytest.raises(UserError, match=r"trained with tiny-random-llama .* tiny-random-gpt2 has sha256"):
        UserLLM.from_pretrained(saved, lm="tiny-random-gpt2")


def test_a_trained_lm_is_not_replaced(make_user_llm, tmp_path):
    make_user_llm(strategy="full").save_pretrained(tmp_path / "model")
    with pytest.raises(
        UserError, match=r"was trained with it and lies in .* leave out lm, which is 'tiny-random-llama'"
    ):
        UserLLM.from_pretrained(tmp_path / "model", lm="tiny-random-llama")


def test_what_is_no_model_is_refused(saved, tmp_path):
    with pytest.raises(UserError, match="no model there"):
        UserLLM.from_pretrained(tmp_path / "nothing")
    config = json.loads((saved / "config.json").read_text())
    for text in (json.dumps(config | {"format_version": 99}), "{", '{"a": 1}', "[]"):
        (saved / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json"):
            UserLLM.from_pretrained(saved)


@pytest.mark.parametrize("part", ["fusion", "encoder", "tasks.next_item", "fields.0", "fusion.text"])
def test_a_setting_of_a_later_userllm_is_named(saved, part):
    file = saved / "config.json"
    whole = json.loads(file.read_text())
    group = whole | {"created_by": "userllm 9.9"}
    for key in part.split("."):
        group = group[int(key) if key.isdigit() else key]
    group["brand_new"] = 1
    file.write_text(json.dumps(whole | {"created_by": "userllm 9.9"}))
    with pytest.raises(UserError, match=r"config\.json: .*'brand_new'; it was written by userllm 9\.9"):
        UserLLM.from_pretrained(saved)


@pytest.mark.parametrize("part", ["strategy", "lm", "encoder", "fields", "fusion", "tasks"])
def test_a_part_that_is_missing_is_named(saved, part):
    file = saved / "config.json"
    whole = json.loads(file.read_text())
    del whole[part]
    file.write_text(json.dumps(whole))
    with pytest.raises(UserError, match=rf"config\.json: '{part}' is missing; save the model again"):
        UserLLM.from_pretrained(saved)


@pytest.mark.parametrize(
    "name", ["encoder.safetensors", "fusion.safetensors", "items.parquet", "vocabulary.json"]
)
@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_a_damaged_folder_is_refused(saved, name, damage):
    file = saved / name
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        UserLLM.from_pretrained(saved)


def test_parts_of_two_models_are_refused_with_the_reason(saved, make_user_llm, make_encoder, tmp_path):
    other = make_user_llm(layers="last:1", events=4)
    other.save_pretrained(tmp_path / "other")
    mine = (saved / "fusion.safetensors").read_bytes()
    shutil.copy(tmp_path / "other" / "fusion.safetensors", saved)
    with pytest.raises(UserError, match=r"fusion\.safetensors: blocks\.2\.gate is absent, .* need \(1,\)"):
        UserLLM.from_pretrained(saved)
    (saved / "fusion.safetensors").write_bytes(mine)
    wide = make_encoder(width=32)
    save_file(wide.state_dict(), saved / "encoder.safetensors")
    with pytest.raises(UserError, match=r"encoder\.safetensors: .* is \(.*\), .* need \(.*\)"):
        UserLLM.from_pretrained(saved)


def test_what_lies_beside_a_model_is_not_swept_away(make_user_llm, tmp_path):
    model, folder = make_user_llm(), tmp_path / "model"
    model.save_pretrained(folder)
    model.save_pretrained(folder)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes\.txt beside a model"):
        model.save_pretrained(folder)
    assert (folder / "notes.txt").read_text() == "mine"
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        model.save_pretrained(tmp_path / "file")


def test_a_link_to_a_model_stays_one(make_user_llm, tmp_path):
    model = make_user_llm()
    model.save_pretrained(tmp_path / "first")
    (tmp_path / "current").symlink_to("first")
    before = (tmp_path / "first" / "config.json").stat().st_ino
    model.save_pretrained(tmp_path / "current")
    assert (tmp_path / "current").is_symlink()
    assert (tmp_path / "first" / "config.json").stat().st_ino != before
