"""Text Prompt against User-LLM at the same history length: LM tokens, FLOPs, time and memory, in one run.

Text Prompt writes the latest 50 events into the prompt (title by title); User-LLM attends to their embeddings. Same LM,
same tasks, same examples. Encoder, fusion and user tokens are inside every figure of User-LLM's. FLOPs are those that
torch's counter sees (matrix products and attention), time is CPU seconds. Two pairs, like compared with like:

    frozen LM: cross-attention as the configuration has it (strategy enc)  -  Text Prompt answering (nothing trained)
    trained LM: cross-attention, prompt attended to, strategy lora         -  Text Prompt, strategy lora

    python benchmarks/bench_text_prompt.py --config configs/movielens-1m.yaml --out docs/results/benchmarks
"""

from __future__ import annotations

import gc
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from measure import alternate, argument_parser, flop_counter, ratio, write_result
from userllm.cli.configuration import load_config
from userllm.model import UserLLM
from userllm.pipeline import Run
from userllm.training.contextualize import ContextualizedLosses
from userllm.training.examples import ExampleBatches

WAYS = {
    "user_llm_enc": ["fusion.attend=answer", "contextualize.strategy.name=enc"],
    "user_llm_lora": ["fusion.attend=text", "contextualize.strategy.name=lora"],
    "text_prompt_lora": [
        "fusion.kind=none",
        "fusion.catalogue=null",
        "fusion.text.events=50",
        "contextualize.strategy.name=lora",
    ],
}


class Way:
    """One way of telling the LM about the user: training steps and answers on the same examples."""

    def __init__(self, args: Any, name: str):
        fixed = ["name=benchmark", "pretrain=null", "tasks.next_item.teacher=0"]
        config, plain = load_config(args.config, [*fixed, *WAYS[name], *args.overrides])
        config.tasks = {"next_item": config.tasks["next_item"]}
        self.run = Run(config, plain)
        self.run.through("pretrain")
        self.model: UserLLM = self.run.build_model()
        if self.model.lm_is_frozen:
            self.model.store_lower_states()
        self.losses = ContextualizedLosses(self.model)
        counts = config.contextualize
        counts.histories, counts.examples_per_history = args.users, 1
        run = self.run
        self.batches = ExampleBatches(self.model, run.dataset, run.split, run.stored, counts, seed=0)
        learning = [p for p in self.losses.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(learning, lr=1e-5, fused=True)
        everyone = run.split.examples("test", self.model.encoder.max_length)
        some = np.random.default_rng(0).permutation(len(everyone))
        self.rows, self.many = everyone[some[: args.users]], everyone[some[:500]]
        self.step = 0

    def train(self) -> float:
        """One optimiser step on one example of each user."""
        self.losses.train()
        examples = self.batches.batch(self.step)["examples"]
        self.step += 1
        self.losses(examples)["loss"].backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return len(examples.task)

    @torch.no_grad()
    def answer(self) -> float:
        """The ten best items of each user, their histories read anew."""
        self.model.eval()
        users = self.model.context(self.run.stored.batch(self.rows))
        self.model.rank_answers("next_item", users, 10, 10)
        return len(self.rows)

    @torch.no_grad()
    def tokens(self) -> float:
        """Mean number of tokens the LM reads before its answer, over 500 test users."""
        users = self.model.context(self.run.stored.batch(self.many))
        read = len(self.model.answers["next_item"].prompt_ids)
        if users.prefix is not None:
            read += float(users.prefix.mask.sum(1).float().mean()) - len(self.model.opening)
        return read

    def flops(self, what: Callable[[], float]) -> float:
        """FLOPs per example of one call, by torch's counter."""
        what()
        with flop_counter() as counter:
            units = what()
        return counter.get_total_flops() / units


def peak_mb(what: Callable[[], float]) -> float:
    """How far one call lifts the process's peak memory, in MB: meaningful for the largest call so far only."""
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    what()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    """See the module."""
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--users", type=int, default=8, help="users in a training step and in an answer")
    args = parser.parse_args()
    ways = {name: Way(args, name) for name in WAYS}  # small first: peak memory only rises
    lifted = {
        name: {"train": peak_mb(way.train), "answer": peak_mb(way.answer)} for name, way in ways.items()
    }
    flops = {
        name: {"train": way.flops(way.train), "answer": way.flops(way.answer)} for name, way in ways.items()
    }
    rates = {
        what: alternate(
            {name: getattr(way, what) for name, way in ways.items()}, args.rounds, clock=time.process_time
        )
        for what in ("train", "answer")
    }
    against = [name for name in ways if name != "text_prompt_lora"]
    write_result(
        "text_prompt",
        {
            "events": 50,
            "users": args.users,
            "lm": ways["user_llm_enc"].model.reference.name,
            "lm_tokens": {name: way.tokens() for name, way in ways.items()},
            "history_lengths": {"mean": float(np.mean([r[2] - r[1] for r in ways["user_llm_enc"].many]))},
            "flops_per_example": flops,
            "flops_ratio": {
                what: {name: flops["text_prompt_lora"][what] / flops[name][what] for name in against}
                for what in ("train", "answer")
            },
            "examples_per_cpu_s": rates,
            "speed_ratio": {
                what: {name: ratio(rates[what], name, "text_prompt_lora") for name in against}
                for what in rates
            },
            "peak_memory_lift_mb": lifted,
            "median_examples_per_cpu_s": {
                what: {name: statistics.median(values) for name, values in rates[what].items()}
                for what in rates
            },
        },
        args.out,
    )


if __name__ == "__main__":
    main()
