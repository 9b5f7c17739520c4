"""What it costs that a language model knows its user: User-LLM's ways against Text Prompt, by length of the history.

For each length, all of one user, in one process, round after round the ways one after the other:

    LM tokens       what the language model reads before it answers
    first token     from the history (or from what is kept of the user) to the answer's first token
    per token       of the 15 that follow
    training step   forward and backward of one example, everything trained (the papers' "full"), without the
                    optimiser's own step, which is the same for every way
    FLOPs           by torch's counter, encoder, Perceiver and fusion included, in parts, beside 2ND and 6ND
    peak memory     how far the process's resident memory rises above what it was before the call

The language model has its real weights, encoder and fusion have random ones: the cost does not depend on them. Titles
and histories are real. The shape is the paper's as far as it is stated: encoder of 6 x 128, gated cross-attention in
every layer, Perceiver of 6 layers and 16 latents, task prompt of 10, a question of about 32 tokens. Times are CPU
seconds of one thread, so that other work on the machine does not count; wall seconds stand beside them.

    python benchmarks/efficiency.py --out docs/results/benchmarks
"""

from __future__ import annotations

import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from efficiency_figure import draw
from measure import argument_parser, flop_counter, write_result
from userllm.cli.configuration import load_config
from userllm.contextual import ContextualLM
from userllm.encoders import AutoregressiveConfig
from userllm.errors import UserError
from userllm.fusion.config import FusionConfig
from userllm.fusion.history_text import HistoryTextConfig
from userllm.fusion.perceiver import PerceiverConfig
from userllm.language_models.pretrained import load
from userllm.model import encoder_for, event_texts
from userllm.pipeline import Run
from userllm.serving.record import Kept, context_of, remember
from userllm.serving.user_side import UserSide
from userllm.tasks import TaskConfig, build_task
from userllm.text_in_lm import TextInLM

LENGTHS = [10, 50, 100, 200, 500, 1000]
QUESTION = (
    "Here is a user of a large film archive, whose history you know. Of all the films that this user has not "
    "seen yet, the one to watch next is"
)
ANSWER = 16
"""Tokens of an answer."""
WAYS: dict[str, dict[str, Any]] = {
    "keys_values_kept": {},
    "tokens_kept": {},
    "cross_attention": {},
    "perceiver": {"perceiver": PerceiverConfig()},
    "soft_prompt": {"kind": "soft_prompt"},
    "text_prompt": {"kind": "none"},
}
KEPT = {"keys_values_kept": Kept(keys_values=True), "tokens_kept": Kept()}
"""Ways to answer from what is kept of the user; nothing of theirs can be trained."""


class Way:
    """One way for histories of ``events`` events, on a language model that it shares with the others."""

    def __init__(self, lm: Any, tokenizer: Any, run: Run, name: str, events: int, user: int):
        torch.manual_seed(0)
        self.name, self.events, self.lm = name, events, lm
        encoder = encoder_for(run.vocabulary, AutoregressiveConfig(max_length=events))
        limit = lm.config.get_text_config().max_position_embeddings - ANSWER - 64
        text = HistoryTextConfig(events=events if name == "text_prompt" else 0, max_tokens=limit)
        fusion = FusionConfig(events=events, text=text, **WAYS[name])
        asked = TaskConfig(kind="favorite_category", prompt=QUESTION)  # any closed task brings a prompt along
        tasks = {"ask": build_task("ask", asked, run.dataset.items)}
        self.model = ContextualLM(lm, tokenizer, encoder, fusion, tasks, event_texts(run.stored.collator))
        self.model.requires_grad_(False)
        self.model.attachment.detach()
        length = int(run.dataset.lengths[user])
        self.batch = run.stored.batch([(user, length - events - 1, length - 1)])
        target = run.stored.items[run.stored.offsets[user] + length - 1]
        self.title = str(run.dataset.items["title"][int(target)])
        self.record = None
        if name in KEPT:
            model = self.model
            side = UserSide(
                encoder, model.user_tokens, model.attachment.blocks, fusion, run.stored.collator, {}
            )
            encoder.eval()
            self.record = remember(side, self.batch, [events], [torch.zeros(0)], KEPT[name])[0]
        self.seconds: dict[str, list[float]] = {}
        self.flops: dict[str, float] = {}
        self.peak: dict[str, float | None] = {}

    def context(self) -> Any:
        """The user: from what is kept, or from the history."""
        return (
            self.model.context(self.batch) if self.record is None else context_of(self.model, [self.record])
        )

    def answer(self, tokens: int = ANSWER) -> dict[str, float]:
        """CPU and wall seconds to the first token, and for each that follows."""
        model = self.model.eval()
        with torch.no_grad():
            clocks = [(time.process_time(), time.perf_counter())]
            users = self.context()
            with model.conditioned(users):
                state = TextInLM(model, 1, "ask", replay=False, context=users)
                hidden = state.start(model.question("ask"))
                token = model.head(hidden).argmax(-1)
                clocks.append((time.process_time(), time.perf_counter()))
                for _ in range(tokens - 1):
                    hidden = state.advance(token, torch.zeros_like(token), torch.zeros_like(token))
                    token = model.head(hidden).argmax(-1)
            clocks.append((time.process_time(), time.perf_counter()))
        (a, b), (c, d), (e, f) = clocks
        told = {"first_token": c - a, "first_token_wall": d - b, "answer": e - a, "answer_wall": f - b}
        return told | ({"per_token": (e - c) / (tokens - 1)} if tokens > 1 else {})

    def train(self) -> dict[str, float]:
        """CPU and wall seconds of forward and backward of one example."""
        model = self.model.train().requires_grad_(True)
        began = time.process_time(), time.perf_counter()
        nll, _ = model.text_losses([QUESTION], [self.title], self.context())
        nll.mean().backward()
        took = {
            "training_step": time.process_time() - began[0],
            "training_step_wall": time.perf_counter() - began[1],
        }
        model.requires_grad_(False).zero_grad(set_to_none=True)
        return took

    def attached(self, what: Callable[[], Any]) -> Any:
        """``what`` with this way's cross-attention in the language model."""
        self.model.attachment.attach()
        try:
            return what()
        finally:
            self.model.attachment.detach()

    def time(self, what: Callable[[], dict[str, float]]) -> None:
        """One round more."""
        gc.collect()
        for name, seconds in self.attached(what).items():
            self.seconds.setdefault(name, []).append(seconds)

    def count(self, name: str, what: Callable[[], Any]) -> Any:
        """FLOPs of one call, by torch's counter."""
        with flop_counter() as counter:
            result = self.attached(what)
        self.flops[name] = float(counter.get_total_flops())
        return result

    def count_parts(self) -> None:
        """FLOPs of the user alone, and of the language model alone on as many tokens as it reads, from shapes."""
        with torch.no_grad():
            users = self.count("user", self.context)
        self.lm_tokens = len(self.model.question("ask"))
        if users.prefix is not None:
            self.lm_tokens += int(users.prefix.mask.sum()) - len(self.model.opening)
        self.flops["lm"] = flops_from_shapes(self.lm, self.lm_tokens)

    def lift(self, name: str, what: Callable[[], Any]) -> None:
        """How far a call lifts the resident memory at most, in MiB."""
        gc.collect()
        self.peak[name] = None
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
        except OSError as error:
            print(f"peak memory cannot be had here: {error}")
            what()
            return
        before = _status("VmRSS")
        what()
        self.peak[name] = (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def flops_from_shapes(lm: Any, tokens: int, backward: bool = False) -> float:
    """FLOPs of the language model's layers over so many tokens, on torch's meta device: nothing is computed."""
    with torch.device("meta"):
        shapes = type(lm)(lm.config)
        text = torch.zeros(1, tokens, lm.config.hidden_size, requires_grad=True)
        mask = torch.zeros(1, 1, tokens, tokens)  # given, so that none is made from values that are not there
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
            hidden = shapes.get_decoder()(inputs_embeds=text, attention_mask=mask, use_cache=False)
            if backward:
                hidden.last_hidden_state.sum().backward()
    return float(counter.get_total_flops())


def measure(way: Way, args: Any) -> None:
    """What is measured once: FLOPs and memory, of the same call, which also warms up."""
    way.count_parts()
    way.lift("answer", lambda: way.count("first_token", lambda: way.answer(1)))
    if way.record is None and way.lm_tokens <= args.train_tokens:
        way.lift("training_step", lambda: way.count("training_step", way.train))


def rounds(ways: list[Way], args: Any) -> None:
    """Rounds over all ways. A way that takes long is in fewer of them: see --seconds."""
    for number in range(args.rounds):
        for way in ways:
            for what in (way.answer, *([way.train] if "training_step" in way.flops else [])):
                key = "answer" if what == way.answer else "training_step"
                if number and sum(way.seconds[key]) + way.seconds[key][0] > args.seconds:
                    continue
                way.time(what)


def told(way: Way, parameters: int, lm: Any) -> dict[str, Any]:
    """One cell of the result."""
    medians = {name: statistics.median(values) for name, values in way.seconds.items()}
    trained = "training_step" in way.flops
    return {
        "lm_tokens": way.lm_tokens,
        "cpu_s": {k: v for k, v in medians.items() if not k.endswith("_wall")},
        "wall_s": {k.removesuffix("_wall"): v for k, v in medians.items() if k.endswith("_wall")},
        "rounds": {k: len(v) for k, v in way.seconds.items() if not k.endswith("_wall")},
        "all_cpu_s": {k: v for k, v in way.seconds.items() if not k.endswith("_wall")},
        "flops": way.flops,
        "flops_from_shapes": {"training_step": flops_from_shapes(lm, way.lm_tokens + 8, True)}
        if way.record is None
        else {},
        "formula": {
            "first_token": 2.0 * parameters * way.lm_tokens,
            **({"training_step": 6.0 * parameters * (way.lm_tokens + 8)} if way.record is None else {}),
        },
        "trained": trained,
        "peak_mib": way.peak,
    }


def main() -> None:
    """See the module."""
    parser = argument_parser(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--seconds",
        type=float,
        default=12,
        help="CPU seconds for the rounds of one cell; the first always runs",
    )
    parser.add_argument(
        "--train-tokens",
        type=int,
        default=2600,
        help="longest text a training step is measured on, in tokens",
    )
    parser.add_argument("--quick", action="store_true", help="lengths 10 and 50, two rounds: does it run?")
    args = parser.parse_args()
    if args.quick:
        args.lengths, args.rounds = [10, 50], 2
    torch.set_num_threads(1)
    run = Run(*load_config(args.config, ["name=benchmark", *args.overrides]))
    run.through("data")
    long = np.flatnonzero(run.dataset.lengths > max(args.lengths))
    if len(long) == 0:
        raise UserError(f"no user has more than {max(args.lengths)} events; give smaller --lengths")
    lm, tokenizer, reference = load(run.config.lm)
    embedded = lm.get_input_embeddings().weight.numel()
    parameters = sum(w.numel() for w in lm.parameters()) - embedded
    cells: dict[str, dict[str, Any]] = {}
    for events in args.lengths:
        ways = [Way(lm, tokenizer, run, name, events, int(long[0])) for name in WAYS]
        for way in ways:
            measure(way, args)
        rounds(ways, args)
        for way in ways:
            cells.setdefault(way.name, {})[str(events)] = cell = told(way, parameters, lm)
            print(
                f"{events} events, {way.name}: {way.lm_tokens} tokens, {cell['cpu_s']}, {cell['peak_mib']}",
                flush=True,
            )
    result = {
        "lm": reference.name,
        "lm_weights": reference.source,
        "parameters_without_embeddings": parameters,
        "lengths": args.lengths,
        "question_tokens": cells["cross_attention"][str(args.lengths[0])]["lm_tokens"],
        "answer_tokens": ANSWER,
        "train_tokens": args.train_tokens,
        "user": run.dataset.user_ids[int(long[0])],
        "dataset": {"name": run.dataset.card.name, "fingerprint": run.dataset.card.fingerprint},
        "cells": cells,
    }
    write_result("efficiency", result, args.out)
    draw(result, args.out / "efficiency.png")


if __name__ == "__main__":
    main()
