"""Several short runs by one group of processes, since starting a process takes longer than a run.

run_cases.py '[{"file": ..., "overrides": [...], "fsdp": ...}, ...]'; writes what ``shard`` made of each model to
shards.jsonl: how much of its weights this process holds, what is a unit, and whether a tied table is still one.
"""

import json
import sys
from pathlib import Path

from torch.distributed.fsdp import FSDPModule

from userllm import processes
from userllm.cli.configuration import load_config
from userllm.pipeline import Run
from userllm.training import trainer

shard = trainer.shard


def shard_and_tell(model, units):
    shard(model, units)
    weights = list(model.parameters())
    held = sum(weight.to_local().numel() for weight in weights) / sum(weight.numel() for weight in weights)
    modules = dict(model.named_modules())
    lm = modules.get("model.lm")
    told = {
        "held": held,
        "units": sorted(n for n, m in modules.items() if isinstance(m, FSDPModule)),
        "tied": lm and lm.get_input_embeddings().weight is lm.get_output_embeddings().weight,
    }
    if processes.is_main():
        with Path("shards.jsonl").open("a") as file:
            file.write(json.dumps(told) + "\n")


trainer.shard = shard_and_tell
for case in json.loads(sys.argv[1]):
    config, plain = load_config(case["file"], case["overrides"])
    Run(config, plain, fsdp=case["fsdp"]).through("contextualize")
processes.stop()
