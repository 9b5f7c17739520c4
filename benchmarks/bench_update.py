"""A user with 1,000 events adds one: the time of updating what is kept of them, against computing it anew.

Both sides go from the dataset's events to user tokens (and, in the second pair of rows, to the cross-attention's keys
and values of four layers). The encoders have random weights: the cost does not depend on them.

    python benchmarks/bench_update.py --out docs/results/benchmarks
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import numpy as np
import torch

from measure import alternate, argument_parser, ratio, write_result
from userllm.cli.configuration import load_config
from userllm.data.collation import StoredHistories
from userllm.encoders import AutoregressiveConfig
from userllm.fusion.config import FusionConfig
from userllm.fusion.cross_attention import CrossAttentionBlock
from userllm.fusion.projection import UserTokens
from userllm.model import encoder_for
from userllm.pipeline import Run
from userllm.serving.record import Kept, UserRecord, extend, remember
from userllm.serving.user_side import UserSide

ENCODERS = {
    "2 x 128, relative time": {"layers": 2, "heads": 2, "feed_forward": 256, "positions": "relative_time"},
    "6 x 128, learned positions (paper)": {},
    "6 x 128, rotary positions": {"positions": "rotary"},
}
LM_WIDTH, FUSED = 576, 4
"""Of the language model whose cross-attention's keys and values are kept: SmolLM2-135M, its last four layers."""


class Way:
    """One encoder and one user: their record after ``events`` events, and two ways to the next one."""

    def __init__(self, stored: StoredHistories, user: int, events: int, encoder: dict, keys_values: bool):
        torch.manual_seed(0)
        settings = {"dropout": 0.0, "max_length": events + 24} | encoder
        built = encoder_for(stored.collator.vocabulary, AutoregressiveConfig(**settings)).eval()
        fusion = FusionConfig()
        tokens = UserTokens.of(fusion, built.width)
        blocks = {n: CrossAttentionBlock(fusion.block, LM_WIDTH, built.width) for n in range(FUSED)}
        self.side = UserSide(built, tokens, blocks, fusion, stored.collator, {})
        self.stored, self.user, self.events = stored, user, events
        self.keep = Kept(keys_values, True)
        self.seen = torch.from_numpy(np.unique(stored.items[: events + 1]).astype(np.int64))
        self.before = self.whole(events)

    def whole(self, events: int) -> UserRecord:
        """The record from the first ``events`` events."""
        batch = self.stored.batch([(self.user, 0, events)])
        return remember(self.side, batch, [events], [self.seen], self.keep)[0]

    def updated(self) -> UserRecord:
        """The record from the one before and one event more."""
        batch = self.stored.batch([(self.user, self.events, self.events + 1)])
        return extend(self.side, [self.before], batch, [self.seen[-1:]], self.keep)[0]

    def times(self, what: Callable[[], object], count: int) -> Callable[[], float]:
        """``what`` so many times over: what ``alternate`` takes."""

        def run() -> float:
            for _ in range(count):
                what()
            return count

        return run


def main() -> None:
    """See the module."""
    parser = argument_parser(__doc__)
    parser.add_argument("--events", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    run = Run(*load_config(args.config, ["name=benchmark", *args.overrides]))
    run.through("data")
    lengths = run.dataset.lengths
    user = int(np.flatnonzero(lengths > args.events)[0])
    rows = {}
    for name, encoder in ENCODERS.items():
        for keys_values in (False, True):
            way = Way(run.stored, user, args.events, encoder, keys_values)
            print(f"{name}{', with keys and values' if keys_values else ''}")
            rates = alternate(
                {
                    "update": way.times(way.updated, 50),
                    "recompute": way.times(lambda way=way: way.whole(args.events + 1), 3),
                },
                args.rounds,
            )
            updated, anew = way.updated(), way.whole(args.events + 1)
            state = way.before.state
            assert state is not None
            rows[f"{name}{', keys and values' if keys_values else ''}"] = {
                "update_ms": 1e3 / statistics.median(rates["update"]),
                "recompute_ms": 1e3 / statistics.median(rates["recompute"]),
                "update_over_recompute": ratio(rates, "recompute", "update"),
                "largest_difference": float((updated.embeddings - anew.embeddings).abs().max()),
                "state_mb": sum(k.nbytes + v.nbytes for k, v in state.keys_values) / 1e6,
            }
    result = {"events": args.events, "weights": "random", "dataset": run.dataset.card.name, "rows": rows}
    write_result("update", result, args.out)


if __name__ == "__main__":
    main()
