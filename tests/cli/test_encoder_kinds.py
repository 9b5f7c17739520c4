"""``encoder.kind`` chooses the encoder, and with it what ``encoder`` can say."""

import json
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest

from userllm import UserError, load_config
from userllm.cli.configuration import describe_settings
from userllm.config import RunConfig
from userllm.encoders import DualConfig, EncoderConfig, encoder_config_class

SHORT = ["pretrain.epochs=1", "contextualize.steps=2", "evaluation.users=4"]
KINDS = [kind.kind for kind in get_args(EncoderConfig)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_chooses_the_dataclass(kind, tmp_path):
    config, plain = load_config(None, [f"encoder.kind={kind}", "encoder.layers=2"])
    assert type(config.encoder) is encoder_config_class(kind)
    assert (config.encoder.kind, config.encoder.layers) == (kind, 2)
    assert plain["encoder"]["kind"] == kind
    assert set(plain["encoder"]) == {field.name for field in fields(config.encoder)}
    (tmp_path / "c.yaml").write_text(json.dumps(plain))
    again, same = load_config(tmp_path / "c.yaml")
    assert again == config and same == plain
    assert RunConfig(encoder=config.encoder) == config


def test_a_group_can_be_replaced_as_a_whole():
    demo = Path(__file__).parents[2] / "configs" / "demo.yaml"
    with pytest.raises(
        UserError, match=r"encoder\.field_weights is a setting of encoder\.kind=autoregressive or bert4rec"
    ):
        load_config(demo, ["encoder.kind=dual"])
    config, _ = load_config(demo, ["encoder={kind: dual, layers: 3}"])
    assert config.encoder == DualConfig(layers=3)


def test_the_default_is_the_autoregressive_encoder():
    for overrides in ([], ["encoder.layers=6"], ["encoder.kind=autoregressive"]):
        assert load_config(None, overrides)[0] == RunConfig()
    assert RunConfig().encoder.kind == "autoregressive"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["encoder.kind=bert"], "encoder.kind is 'bert'; use autoregressive, dual, bert4rec or text"),
        (["encoder.kind=null"], "encoder.kind is None"),
        (["encoder.hidden_share=0.5"], "encoder.hidden_share is a setting of encoder.kind=bert4rec; this"),
        (["encoder.kind=dual", "encoder.hidden_share=0.5"], "setting of encoder.kind=bert4rec; this encoder is dual"),
        (["encoder.kind=dual", "encoder.label=year"], "encoder.label year is not one of data.fields"),
        (["encoder.kind=dual", "encoder.label=genres", "tasks.next_item.teacher=0.5"], "encoder.label genres: cannot"),
        (["encoder.kind=bert4rec", "encoder.nonsense=1"], "nonsense"),
        (["encoder.kind=bert4rec", "encoder.heads=3"], "encoder.width 128 is not a multiple of encoder.heads 3"),
        (["encoder.kind=bert4rec", "encoder.layers=many"], "encoder.layers"),
        (["encoder=bert4rec"], "encoder is a group of settings"),
        (["encoder.kind=bert4rec", "split.kind=paper", "split.window=300"], "encoder.max_length 200 is below"),
    ],
)  # fmt: skip
def test_one_clear_error(overrides, message):
    with pytest.raises(UserError) as caught:
        load_config(None, overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_every_kinds_settings_are_listed():
    listed = {name: (default, meaning) for name, default, meaning in describe_settings()}
    for kind in KINDS:
        config = encoder_config_class(kind)()
        for field in fields(config):
            name = f"encoder.{field.name}" + ("" if kind == "autoregressive" else f" (kind: {kind})")
            assert json.loads(listed[name][0]) == getattr(config, field.name)
            assert listed[name][1]


@pytest.mark.slow  # make smoke has them in experiments, too
@pytest.mark.parametrize("kind", ["bert4rec", "dual"])
def test_a_run_of_each_kind(userllm, finished, tmp_path, kind):
    settings = [f"data.path={finished / 'raw'}", f"encoder.kind={kind}", *SHORT]
    said = userllm("run", finished / "config.yaml", *settings, cwd=tmp_path)
    assert said.code == 0, said.err
    metrics = json.loads((tmp_path / "runs/demo/metrics.json").read_text())
    assert metrics["tasks"]["next_item"]["n"] == 4
    assert metrics["tasks"]["next_item"]["encoder"]["recall@10"]["value"] >= 0
    model = json.loads((tmp_path / "runs/demo/contextualize/model/config.json").read_text())
    assert model["encoder"]["kind"] == kind
    said = userllm("recommend", "runs/demo", "--user", "1", cwd=tmp_path)
    assert said.code == 0, said.err
    said = userllm("run", finished / "config.yaml", *settings, cwd=tmp_path)
    assert said.out.count("skipped") == 4
