"""The pretrained encoder's own leave-last-out ranking of the full catalogue, for the table beside RecTools' SASRec.

Same split, tie rule, exclusion of seen items and metrics as ``rectools_sasrec.py``: all users, last event as target.

    python benchmarks/encoder_recall.py --config configs/movielens-1m.yaml --out docs/results/movielens-1m
"""

from __future__ import annotations

import json
import os
import time

from measure import argument_parser
from userllm.cli.configuration import load_config
from userllm.evaluation.metrics import ranking_metrics
from userllm.evaluation.ranking import encoder_ranks
from userllm.pipeline import Run, commit, hardware


def main() -> None:
    """See the module."""
    parser = argument_parser(__doc__, "docs/results/movielens-1m")
    args = parser.parse_args()
    config, plain = load_config(args.config, args.overrides)
    run = Run(config, plain)
    run.through("pretrain")
    encoder = run.load_encoder()
    rows = run.split.examples("test", encoder.max_length)
    ranks, _ = encoder_ranks(encoder, run.stored, run.dataset, rows, exclude_seen=True)
    history = json.loads((run.folder / "pretrain" / "log_history.json").read_text())
    result = {
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "layers": config.encoder.layers,
        "width": config.encoder.width,
        "n": len(rows),
        "split": run.split.describe(),
        "tie_rule": run.dataset.card.tie_rule,
        "pretrain_seconds": json.loads((run.folder / "stages.json").read_text())["pretrain"]["seconds"],
        "validation": [entry for entry in history if "eval_recall@10" in entry],
        **{name: estimate.as_dict() for name, estimate in ranking_metrics(ranks).items()},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    partial = args.out / ".encoder.partial"
    partial.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(partial, args.out / "encoder.json")
    print({name: result[name] for name in ("recall@1", "recall@10", "ndcg@10", "n")})


if __name__ == "__main__":
    main()
