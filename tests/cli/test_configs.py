import json
from pathlib import Path

import pytest

from userllm import UserError, load_config
from userllm.cli import main
from userllm.cli.configuration import describe_settings

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_shipped_configuration_is_one(file):
    config, plain = load_config(file)
    assert plain["name"] == config.name
    assert config.tasks
    again, same = load_config(file, [f"seed={config.seed}"])
    assert again == config and same == plain
    with pytest.raises(UserError, match="nonsense"):
        load_config(file, ["nonsense=1"])


def test_overrides_are_read_as_yaml():
    config, plain = load_config(
        None, ["evaluation.users=null", "data.fields=[item, rating]", "lm.name=a/b", "pretrain=null"]
    )
    assert config.evaluation.users is None
    assert config.data.fields == ["item", "rating"]
    assert config.lm.name == "a/b"
    assert config.pretrain is None
    assert plain["pretrain"] is None
    assert plain["tasks"]["next_item"]["teacher"] == 0.0


def test_the_papers_protocol():
    config, _ = load_config(CONFIGS[0].with_name("movielens-1m-paper.yaml"))
    assert (config.split.kind, config.split.window) == ("paper", 50)
    assert (config.encoder.layers, config.encoder.width, config.encoder.heads) == (6, 128, 8)
    assert config.encoder.max_length == config.fusion.events == 50
    assert config.contextualize.examples_per_history == 1
    assert config.contextualize.strategy.name == "full"
    assert config.fusion.layers == "all"
    assert {t.normalization for t in config.tasks.values()} == {"vocabulary"}
    assert {t.teacher for t in config.tasks.values()} == {0.0}


def test_the_listed_settings_are_the_defaults():
    _, plain = load_config(None)
    listed = {
        name.replace("tasks.NAME", "tasks.next_item"): default for name, default, _ in describe_settings()
    }
    found = dict(leaves(plain))
    assert {name: json.loads(listed[name]) for name in found} == found
    assert all(meaning for name, _, meaning in describe_settings() if name != "pretrain.batch")


def leaves(values, prefix=""):
    """(dotted name, value) of nested plain values."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def test_settings_of_one_group(capsys):
    assert main(["settings", "split"]) == 0
    assert 'split.kind = "leave_last_out"\n' in capsys.readouterr().out
    assert main(["settings", "spilt"]) == 2


@pytest.mark.parametrize(("given", "kept"), [("pretrain.batch.pool=3", 4096), ("pretrain.patience=1", 4096)])
def test_setting_one_of_a_group_keeps_the_others(given, kept):
    config, _ = load_config(None, [given])
    assert config.pretrain is not None and config.pretrain.batch.events == kept
