"""A user with 1,000 events adds one: the time of updating what is kept of them, against computing it anew.

Both sides go from the dataset's events to user tokens (and, in the second pair of rows, to the cross-attention's keys
and values of four layers). The encoders have random weights: the cost does not depend on them. Times are CPU seconds of
one thread.

    python benchmarks/bench_update.py --out docs/results/benchmarks
"""

from __future__ import annotations

import statistics
import time

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
from userllm.serving.record import Kept, UserRecord, extend, remember, tokens_of
from userllm.serving.user_side import UserSide

ENCODERS = {
    "2 x 128, relative time": {"layers": 2, "heads": 2, "feed_forward": 256, "positions": "relative_time"},
    "6 x 128, learned positions (paper)": {},
    "6 x 128, rotary positions": {"positions": "rotary"},
}
ADDED = 64
"""New events, one after the other; within so many a state has to be moved to a larger place once."""
LM_WIDTH, FUSED = 576, 4
"""Of the language model whose cross-attention's keys and values are kept: SmolLM2-135M, its last four layers."""


class Way:
    """One encoder and one user: their record after ``events`` events, and two ways to those that follow."""

    def __init__(self, stored: StoredHistories, user: int, events: int, encoder: dict, keys_values: bool):
        torch.manual_seed(0)
        settings = {"dropout": 0.0, "max_length": events + ADDED + 1} | encoder
        built = encoder_for(stored.collator.vocabulary, AutoregressiveConfig(**settings)).eval()
        fusion = FusionConfig()
        tokens = UserTokens.of(fusion, built.width)
        blocks = {n: CrossAttentionBlock(fusion.block, LM_WIDTH, built.width) for n in range(FUSED)}
        self.side = UserSide(built, tokens, blocks, fusion, stored.collator, {})
        self.stored, self.user, self.events = stored, user, events
        self.keep = Kept(keys_values, True)
        items = stored.items[stored.offsets[user] :][: events + ADDED]
        self.seen = torch.from_numpy(np.unique(items).astype(np.int64))
        self.before = self.whole(events)

    def whole(self, events: int, state: bool = True) -> UserRecord:
        """The record from the first ``events`` events."""
        batch = self.stored.batch([(self.user, 0, events)])
        keep = Kept(self.keep.keys_values, state)
        record = remember(self.side, batch, [events], [self.seen], keep)[0]
        tokens_of(self.side.user_tokens, [record])
        return record

    def one_by_one(self) -> UserRecord:
        """``ADDED`` new events, after each of which the record is what it has to be."""
        record = self.before
        for _ in range(ADDED):
            batch = self.stored.batch([(self.user, record.events, record.events + 1)])
            record = extend(self.side, [record], batch, [self.seen[-1:]], self.keep)[0]
            tokens_of(self.side.user_tokens, [record])
        return record

    def update(self) -> float:
        """How many updates were made."""
        self.one_by_one()
        return ADDED

    def recompute(self) -> float:
        """How many times the record was computed anew, as cheaply as that can be: without a state."""
        for _ in range(3):
            self.whole(self.events + 1, state=False)
        return 3


def main() -> None:
    """See the module."""
    parser = argument_parser(__doc__)
    parser.add_argument("--events", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    run = Run(*load_config(args.config, ["name=benchmark", *args.overrides]))
    run.through("data")
    lengths = run.dataset.lengths
    user = int(np.flatnonzero(lengths > args.events + ADDED)[0])
    rows = {}
    for name, encoder in ENCODERS.items():
        for keys_values in (False, True):
            way = Way(run.stored, user, args.events, encoder, keys_values)
            print(f"{name}{', with keys and values' if keys_values else ''}")
            ways = {"update": way.update, "recompute": way.recompute}
            rates = alternate(ways, args.rounds, time.process_time)
            updated, anew = way.one_by_one(), way.whole(args.events + ADDED)
            state = way.before.state
            assert state is not None
            rows[f"{name}{', keys and values' if keys_values else ''}"] = {
                "update_ms": 1e3 / statistics.median(rates["update"]),
                "recompute_ms": 1e3 / statistics.median(rates["recompute"]),
                "update_over_recompute": ratio(rates, "recompute", "update"),
                "largest_difference": float((updated.embeddings - anew.embeddings).abs().max()),
                "state_mb": state.kept.nbytes / 1e6,
            }
    result = {
        "events": args.events,
        "added": ADDED,
        "weights": "random",
        "dataset": run.dataset.card.name,
        "rows": rows,
    }
    write_result("update", result, args.out)


if __name__ == "__main__":
    main()
