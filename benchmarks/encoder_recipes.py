"""Every setting of the encoder's recipe, one at a time, each for the same CPU time: what it does to the ranking.

The base is the shipped MovieLens-1M encoder with the paper's own choice for each setting tried here. One row per
setting, trained for ``--seconds`` CPU seconds (the schedule follows the time), one thread, one seed; leave-last-out
test of all users. A row that is there already is not done again.

    python benchmarks/encoder_recipes.py --seconds 150
"""

from __future__ import annotations

import json

from encoder_recall import measure
from measure import argument_parser, write_json
from userllm.cli.configuration import load_config
from userllm.pipeline import Run

BASE = ["encoder.positions=learned", "encoder.item_std=null", "encoder.loss_precision=float32", "threads=1"]
RECIPES: dict[str, list[str]] = {
    "base": [],
    "item table started a quarter as large": ["encoder.item_std=0.02"],
    "rotary positions": ["encoder.positions=rotary"],
    "relative-time positions": ["encoder.positions=relative_time"],
    "learned positions from the end": ["encoder.count_from=end"],
    "time gap as a field, read only": [
        "data.fields=[item, rating, genres, time_gap]",
        "encoder.field_weights={item: 20, time_gap: 0}",
    ],
    "SwiGLU, as many weights": ["encoder.feed_forward_kind=swiglu", "encoder.feed_forward=168"],
    "post-norm": ["encoder.norm=post"],
    "dropout .1": ["encoder.dropout=0.1"],
    "item table from the LM's title embeddings": ["encoder.item_start=text"],
    "all fields weigh alike (paper)": ["encoder.field_weights={}"],
    "item alone": ["data.fields=[item]", "encoder.field_weights={}"],
    "products of the loss in bfloat16": ["encoder.loss_precision=bfloat16"],
    "sampled softmax, 256, uniform": ["encoder.item_loss=sampled"],
    "sampled softmax, 256, popularity": ["encoder.item_loss=sampled", "encoder.proposal=popularity"],
    "gBCE, 256": ["encoder.item_loss=gbce"],
}


def main() -> None:
    """See the module."""
    parser = argument_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--only", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "encoder_recipes.json"
    rows = json.loads(file.read_text()) if file.exists() else {}
    for recipe in args.only:
        if rows.get(recipe, {}).get("seconds") == args.seconds:
            print(f"{recipe}: done before")
            continue
        number = list(RECIPES).index(recipe)
        timing = [f"pretrain.seconds={args.seconds}", "pretrain.evaluate_every=1000", f"name=recipe-{number}"]
        overrides = [*BASE, *RECIPES[recipe], *timing, *args.overrides]
        rows[recipe] = {"seconds": args.seconds, "overrides": overrides} | measure(
            Run(*load_config(args.config, overrides))
        )
        write_json(file, rows)
        print(recipe, {name: rows[recipe][name]["value"] for name in ("recall@10", "ndcg@10")}, flush=True)


if __name__ == "__main__":
    main()
