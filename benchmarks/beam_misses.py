"""What the beam search of a finished run misses: its best k beside the exact best k, for n of the test users.

    python benchmarks/beam_misses.py --config configs/movielens-1m.yaml --users 100 --beams 5 10 20 50

The run must have been made (``userllm run CONFIG``): nothing is trained here.
"""

from __future__ import annotations

import time
from dataclasses import asdict

import numpy as np
import torch

from measure import argument_parser, write_result
from userllm.cli.configuration import load_config
from userllm.errors import UserError
from userllm.evaluation.beam_misses import beam_misses
from userllm.evaluation.ranking import seen_items
from userllm.model import UserLLM
from userllm.pipeline import Run


def main() -> None:
    """See the module."""
    parser = argument_parser(__doc__)
    parser.add_argument("--users", type=int, default=100)
    parser.add_argument("--beams", type=int, nargs="+", default=[5, 10, 20, 50])
    parser.add_argument("-k", type=int, default=10)
    parser.add_argument("--task", default="next_item")
    parser.add_argument("--batch", type=int, default=8, help="users at once")
    args = parser.parse_args()
    config, plain = load_config(args.config, args.overrides)
    run = Run(config, plain)
    folder = run.folder / "contextualize" / "model"
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no model there; finish the run with `userllm run {args.config}` first")
    run.through("data")
    model = UserLLM.from_pretrained(folder)
    model.store_lower_states()
    rows = run.split.examples("test", model.encoder.max_length)
    kept = np.random.default_rng([config.seed, 17]).choice(
        len(rows), min(args.users, len(rows)), replace=False
    )
    rows = rows[np.sort(kept)]
    leave_out = config.evaluation.exclude_seen and model.tasks[args.task].config.kind == "next_item"
    batches = []
    for part in np.array_split(rows, -(-len(rows) // args.batch)):
        with torch.no_grad():
            users = model.context(run.stored.batch(part))
        batches.append((users, seen_items(run.dataset, part) if leave_out else None))
    began = time.perf_counter()
    found = beam_misses(model, args.task, batches, args.k, args.beams)
    write_result(
        "beam_misses",
        {
            "run": config.name,
            "task": args.task,
            "lm": model.reference.name,
            "split": run.split.describe(),
            "n": len(rows),
            "answers": len(model.tasks[args.task].answers),
            "exclude_seen": leave_out,
            "worst_gap_unit": "nats",
            "by_beams": [asdict(misses) for misses in found],
            "seconds": round(time.perf_counter() - began, 1),
        },
        args.out,
    )


if __name__ == "__main__":
    main()
