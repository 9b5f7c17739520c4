"""A pretrained encoder's own leave-last-out ranking of the full catalogue, for the table beside RecTools' SASRec.

Same split, tie rule, exclusion of seen items and metrics as ``rectools_sasrec.py``: all users, last event as target.
The cost of its training stands beside it: CPU seconds without the validations, and target events a CPU second.

    python benchmarks/encoder_recall.py --config configs/movielens-1m.yaml --out docs/results/movielens-1m
    python benchmarks/encoder_recall.py --config configs/bert4rec-movielens-1m.yaml --name bert4rec
"""

from __future__ import annotations

import json
import time
from typing import Any

from measure import argument_parser, write_json
from userllm.cli.configuration import load_config
from userllm.evaluation.metrics import ranking_metrics
from userllm.evaluation.ranking import encoder_ranks
from userllm.pipeline import Run, commit, hardware
from userllm.training.pretrain import PretrainBatches
from userllm.training.trainer import TRAIN_CPU


def measure(run: Run) -> dict[str, Any]:
    """Stage 1 of a run, done if it is missing: test metrics of its encoder, and what the training cost."""
    config = run.config
    assert config.pretrain is not None
    run.through("pretrain")
    encoder = run.load_encoder()
    rows = run.split.examples("test", encoder.max_length)
    ranks, _ = encoder_ranks(encoder, run.stored, run.dataset, rows, exclude_seen=True)
    history = json.loads((run.folder / "pretrain" / "log_history.json").read_text())
    batches = PretrainBatches(run.stored, run.split, encoder.max_length, config.pretrain, config.seed)
    chunks = batches.sampler.sequences.rows
    events = int((chunks[:, 2] - chunks[:, 1] - 1).sum())
    validation = [entry for entry in history if TRAIN_CPU in entry]
    last = validation[-1]
    epochs = last["step"] / batches.per_epoch
    return {
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "n": len(rows),
        "split": run.split.describe(),
        "tie_rule": run.dataset.card.tie_rule,
        "pretrain_seconds": json.loads((run.folder / "stages.json").read_text())["pretrain"]["seconds"],
        "layers": config.encoder.layers,
        "width": config.encoder.width,
        "encoder": run.plain["encoder"],
        "pretrain": run.plain["pretrain"],
        "train_cpu_seconds": last[TRAIN_CPU],
        "epochs": epochs,
        "target_events_per_epoch": events,
        "target_events_a_cpu_second": epochs * events / last[TRAIN_CPU],
        "validation": validation,
        **{name: estimate.as_dict() for name, estimate in ranking_metrics(ranks).items()},
    }


def main() -> None:
    """See the module."""
    parser = argument_parser(__doc__, "docs/results/movielens-1m")
    parser.add_argument("--name", default="encoder", help="of the result file")
    args = parser.parse_args()
    result = measure(Run(*load_config(args.config, args.overrides)))
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / f"{args.name}.json", result)
    told = ("recall@1", "recall@10", "ndcg@10", "n", "train_cpu_seconds", "target_events_a_cpu_second")
    print({name: result[name] for name in told})


if __name__ == "__main__":
    main()
