"""A model goes to a hub and comes back, with its card; an unreachable hub costs seconds and one clear line."""

import json
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from userllm import hub
from userllm.errors import UserError
from userllm.fusion.history_text import HistoryTextConfig
from userllm.language_models import pretrained
from userllm.model import UserLLM


@pytest.fixture
def fake_hub(monkeypatch, tmp_path):
    """A hub that is a folder on this machine; ``asked`` lists what was asked of it."""
    place, asked = tmp_path / "hub", []

    class Api:
        def __init__(self, token=None):
            asked.append(("token", token))

        def create_repo(self, repo_id, **settings):
            asked.append(("create", repo_id, settings))

        def upload_folder(self, repo_id, folder_path, **settings):
            asked.append(("upload", repo_id, settings))
            shutil.copytree(folder_path, place / repo_id)
            return SimpleNamespace(pr_url=None, commit_url=f"https://hub.example/{repo_id}/commit/1")

    def snapshot(repo_id, **settings):
        asked.append(("download", repo_id, settings))
        if not (place / repo_id).is_dir():
            raise not_found(RepositoryNotFoundError, 404)
        return str(place / repo_id)

    monkeypatch.setattr(hub, "hub_problem", lambda: None)
    monkeypatch.setattr(hub.huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", snapshot)
    return SimpleNamespace(place=place, asked=asked, Api=Api)


def assert_alike(loaded, model, dataset):
    history = dataset.history(7)
    torch.testing.assert_close(loaded.score(history), model.score(history), atol=1e-4, rtol=1e-4)


def not_found(kind, status):
    return kind("refused", response=SimpleNamespace(status_code=status, headers={}, request=None))


@pytest.mark.parametrize("strategy", ["enc", "lora", "full"])
def test_up_and_down_again(make_user_llm, dataset, fake_hub, strategy):
    model = make_user_llm(strategy)
    where = model.push_to_hub("me/my-model", private=True, token="secret", commit_message="First")
    assert where == "https://hub.example/me/my-model/commit/1"
    loaded = UserLLM.from_pretrained("me/my-model", revision="v1", token="secret")
    assert_alike(loaded, model, dataset)
    assert loaded.reference.name == model.reference.name == "tiny-random-llama"
    assert fake_hub.asked == [
        ("token", "secret"),
        ("create", "me/my-model", {"private": True, "exist_ok": True}),
        ("upload", "me/my-model", {"revision": None, "commit_message": "First", "create_pr": False}),
        ("download", "me/my-model", {"revision": "v1", "token": "secret"}),
    ]
    card = (fake_hub.place / "me/my-model/README.md").read_text()
    assert 'UserLLM.from_pretrained("me/my-model")' in card


def test_a_folder_of_that_name_comes_first(make_user_llm, fake_hub, tmp_path, monkeypatch):
    make_user_llm().save_pretrained(tmp_path / "me" / "my-model")
    monkeypatch.chdir(tmp_path)
    assert UserLLM.from_pretrained("me/my-model").strategy == "enc"
    assert fake_hub.asked == []


def test_the_hubs_refusals_are_one_line(make_user_llm, fake_hub, monkeypatch):
    with pytest.raises(UserError, match=r"me/none: no such folder, and not found on .*; check the id"):
        UserLLM.from_pretrained("me/none")

    def forbidden(self, *_, **__):
        raise not_found(HfHubHTTPError, 403)

    monkeypatch.setattr(fake_hub.Api, "create_repo", forbidden)
    with pytest.raises(UserError, match=r"me/my-model: the hub answered 403; log in with"):
        make_user_llm().push_to_hub("me/my-model")
    with pytest.raises(UserError, match="'my model' is not a hub id; give OWNER/NAME"):
        make_user_llm().push_to_hub("my model")
    with pytest.raises(UserError, match="'me/my--model' is not a hub id; give OWNER/NAME"):
        make_user_llm().push_to_hub("me/my--model")
    with pytest.raises(UserError, match="runs/my--model: no model there"):
        UserLLM.from_pretrained("runs/my--model")


def test_an_unreachable_hub_costs_seconds(make_user_llm, monkeypatch, tmp_path):
    monkeypatch.setattr(pretrained.hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(pretrained.hub, "ENDPOINT", "http://127.0.0.1:9")
    model, began = make_user_llm(), time.monotonic()
    with pytest.raises(
        UserError, match=r"me/my-model: http://127.0.0.1:9 cannot be reached .*; nothing was uploaded"
    ):
        model.push_to_hub("me/my-model")
    with pytest.raises(
        UserError, match=r"me/my-model: no such folder, and .* not in the local cache: http://127"
    ):
        UserLLM.from_pretrained("me/my-model")
    assert time.monotonic() - began < 10


def test_what_the_cache_has_is_loaded_without_the_hub(make_user_llm, monkeypatch, tmp_path, dataset):
    model = make_user_llm()
    model.save_pretrained(tmp_path / "cached")

    def cached(repo_id, revision, local_files_only):
        if repo_id != "me/cached":
            raise LocalEntryNotFoundError("not there")
        return str(tmp_path / "cached")

    monkeypatch.setattr(hub, "hub_problem", lambda: "HF_HUB_OFFLINE is set")
    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", cached)
    loaded = UserLLM.from_pretrained("me/cached")
    assert_alike(loaded, model, dataset)
    with pytest.raises(UserError, match="not in the local cache: HF_HUB_OFFLINE is set"):
        UserLLM.from_pretrained("me/other")


def test_the_revision_of_the_lm_is_kept(make_user_llm, monkeypatch, tmp_path):
    from dataclasses import replace

    from userllm import model as model_module

    model = make_user_llm()
    model.reference = replace(model.reference, revision="abc")
    model.save_pretrained(tmp_path / "model")
    seen, load = [], model_module.load

    def remember(config):
        seen.append((config.name, config.revision))
        return load(config)

    monkeypatch.setattr(model_module, "load", remember)
    UserLLM.from_pretrained(tmp_path / "model")
    UserLLM.from_pretrained(tmp_path / "model", lm=str(model.reference.folder))
    assert seen == [("tiny-random-llama", "abc"), (str(model.reference.folder), None)]
    assert "tiny-random-llama, revision abc, weights" in (tmp_path / "model/README.md").read_text()


def test_folders_of_the_first_version_still_load(make_user_llm, tmp_path, dataset):
    model = make_user_llm()
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    saved = json.loads(file.read_text())
    del saved["run"], saved["lm"]["revision"]
    file.write_text(json.dumps(saved))
    loaded = UserLLM.from_pretrained(tmp_path / "model")
    assert loaded.run == {}
    assert_alike(loaded, model, dataset)


@pytest.mark.parametrize(
    ("strategy", "trained"),
    [("lora", "a LoRA adapter was trained"), ("full", "the language model was trained")],
)
def test_the_card_of_a_text_prompt_speaks_of_no_embeddings(make_user_llm, tmp_path, strategy, trained):
    model = make_user_llm(strategy, kind="none", text=HistoryTextConfig(events=2))
    model.save_pretrained(tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "A language model that reads latest events as text:" in card
    assert f"| Strategy | {strategy}: {trained} |" in card and "embeddings" not in card


def test_the_card_is_a_card(make_user_llm, tmp_path):
    model = make_user_llm(events=4)
    model.run = {"dataset": {"name": "a | b", "fingerprint": "f1", "users": 24, "items": 20, "events": 1234}}
    model.save_pretrained(tmp_path / "model", name="demo")
    card = (tmp_path / "model" / "README.md").read_text()
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "userllm", "tags": ["userllm", "recommendation", "user-embeddings"]
    }  # fmt: skip
    assert "# demo" in body and "**Unofficial.**" in body and "Not measured yet." in body
    assert "| Dataset | a \\| b (24 users, 20 items, 1,234 events), fingerprint f1 |" in body
    assert "events: 4" in body and "perceiver: none" in body
    assert "enc: encoder and projection were trained, the language model is frozen" in body
    assert UserLLM.from_pretrained(tmp_path / "model").run == model.run
