from pathlib import Path

import pytest

from userllm import UserError, load_config

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
    config, plain = load_config(None, ["evaluation.users=null", "data.fields=[item, rating]", "lm.name=a/b", "pretrain=null"])
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
