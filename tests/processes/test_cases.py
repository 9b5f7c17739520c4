"""Every way to train stage 2, by one process, by two side by side (DDP), and by two that share the weights (FSDP2)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

# starting processes takes most of the time: minutes on a busy machine
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

CASES = {
    "enc": ("config.yaml", ["contextualize.strategy.name=enc", "fusion.attend=answer"]),
    "lora": ("config.yaml", ["contextualize.strategy.name=lora", "fusion.catalogue={tokens: 2}"]),
    "full": ("config.yaml", ["contextualize.strategy.name=full", "lm.name=tiny-random-gemma3"]),
    "lonely": ("config.yaml", ["contextualize.strategy.name=proj", "contextualize.histories=1"]),
    "t5": ("config.yaml", ["lm.name=tiny-random-t5", "fusion.perceiver={}"]),
    "texts": ("texts.yaml", ["fusion.kind=soft_prompt", "contextualize.alignment={steps: 3, histories: 3}"]),
    "none": (
        "texts.yaml",
        [
            "fusion.kind=none",
            "fusion.text.events=3",
            "contextualize.strategy.name=lora",
            "contextualize.histories=1",
        ],
    ),
}


@pytest.fixture(scope="module")
def both(work: Path, together) -> Path:
    """The folder with the runs of two processes: NAME-ddp and NAME-fsdp."""
    cases = [
        {"file": file, "overrides": [*overrides, f"name={name}-{how}"], "fsdp": how == "fsdp"}
        for how in ("ddp", "fsdp")
        for name, (file, overrides) in CASES.items()
    ]
    script = Path(__file__).parent / "run_cases.py"
    together(2, str(script), json.dumps(cases), timeout=2500)
    return work / "runs"


@pytest.mark.parametrize("case", CASES)
def test_the_loss_curve_is_that_of_one_process(both, alone, same_curve, weights, case):
    file, overrides = CASES[case]
    one = alone("contextualize", *overrides, f"name={case}-one", file=file)
    for how in ("ddp", "fsdp"):
        same_curve(one, both / f"{case}-{how}")
        first, second = weights(one), weights(both / f"{case}-{how}")
        assert first.keys() == second.keys()
        for name in first:
            assert torch.allclose(first[name], second[name], atol=5e-3), (how, name)


def test_each_process_holds_its_share(both, work):
    """Blocks and layers are units; the rest, tied embeddings among it, is the root's."""
    said = [json.loads(line) for line in (work / "shards.jsonl").read_text().splitlines()]
    assert len(said) == 2 * len(CASES)  # both stages
    assert all(0.45 < one["held"] < 0.65 for one in said)
    assert said[0]["units"] == [""]  # stage 1
    enc = said[1]
    layers = {name for name in enc["units"] if name.endswith(".layer")}
    blocks = {name for name in enc["units"] if name.endswith(".user_block")}
    assert len(layers) >= len(blocks) == 2
    assert layers | blocks | {""} == set(enc["units"])
    full = said[2 * list(CASES).index("full") + 1]
    assert full["tied"]  # an LM whose input and output tables are one, and learn


def test_one_process_goes_on_where_two_with_shares_stopped(both, work, alone, same_curve):
    """A checkpoint says nothing of how many processes wrote it, nor how."""
    shutil.copytree(both / "enc-fsdp", work / "runs" / "taken")
    stage = work / "runs" / "taken" / "contextualize"
    shutil.rmtree(stage / "checkpoint-8")
    shutil.rmtree(stage / "model")
    (stage / "log_history.json").unlink()
    alone("contextualize", *CASES["enc"][1], "name=taken")
    assert (stage / "checkpoint-8").is_dir()
    same_curve(both / "enc-ddp", work / "runs" / "taken", ["contextualize"])


def test_training_for_a_time_ends_in_all_processes_together(together, work):
    script = Path(__file__).parent / "run_cases.py"
    overrides = ["name=timed", "pretrain.seconds=1", "contextualize.seconds=1"]
    together(2, str(script), json.dumps([{"file": "config.yaml", "overrides": overrides, "fsdp": False}]))
    facts = json.loads((work / "runs/timed/contextualize/training.json").read_text())
    assert 1 <= facts["seconds"] < 5 and facts["steps"] > 0
