"""Stage 2 (strategy enc): examples/s against a naive loop with the same LM, encoder, blocks and examples.

The naive loop is what one writes first: each example is a history of its own (no encoder pass shared), the
text is padded to 32 tokens, every LM layer is computed and differentiated (gradients flow to the LM's input
embeddings), logits of the whole vocabulary are computed at all positions, and the cross-entropy of the
title's tokens is the loss. userllm runs as configured: shared encoder passes, stored states below the first
fused layer, logits of the catalogue's tokens at the choices only. Both take optimiser steps with the same
trainable weights. Only the last 8 layers are fused.

    python benchmarks/bench_contextualization.py --config configs/movielens-1m.yaml --out docs/results/benchmarks
"""

from __future__ import annotations

import torch

from measure import alternate, argument_parser, ratio, write_result
from userllm.cli.configuration import load_config
from userllm.model import UserLLM
from userllm.pipeline import Run
from userllm.training.contextualize import ContextualizedLosses
from userllm.training.examples import ExampleBatches, Examples
from userllm.training.strategy import apply_strategy, trainable_parameters

PADDED = 32


def naive_loss(model: UserLLM, examples: Examples, embeddings: torch.nn.Module) -> torch.Tensor:
    """The naive loop's loss: see the module's text."""
    histories = examples.histories.select(examples.rows)
    users = model.context(histories, torch.arange(len(examples.rows)), examples.ends)
    closed = model.answers["next_item"]
    titles = closed.tree.answer_tokens()[examples.answers]
    titles = titles.masked_fill(titles < 0, -100)
    prompt = closed.prompt_ids.expand(len(titles), -1)
    labels = torch.cat([torch.full_like(prompt, -100), titles], dim=1)[:, :PADDED]
    ids = torch.cat([prompt, titles.clamp_min(0)], dim=1)[:, :PADDED]
    missing = PADDED - ids.shape[1]
    ids = torch.nn.functional.pad(ids, (0, missing))
    labels = torch.nn.functional.pad(labels, (0, missing), value=-100)
    inputs = embeddings(ids).detach().requires_grad_()
    with model.conditioned(users):
        logits = model.lm(inputs_embeds=inputs, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="userllm steps per round")
    args = parser.parse_args()
    fixed = ["name=benchmark", "pretrain=null", "fusion.layers=last:8", "contextualize.strategy.name=enc"]
    config, plain = load_config(args.config, [*fixed, *args.overrides])
    config.tasks = {"next_item": config.tasks["next_item"]}
    run = Run(config, plain)
    run.through("pretrain")
    model = run.build_model()
    apply_strategy(model, "enc", None)
    model.store_lower_states()
    losses = ContextualizedLosses(model)
    batches = ExampleBatches(model, run.dataset, run.split, run.stored, config.contextualize, seed=0)
    optimizer = torch.optim.AdamW([p for p in losses.parameters() if p.requires_grad], lr=1e-4, fused=True)
    losses.train()
    step = iter(range(10**9))

    def ours() -> float:
        done = 0
        for _ in range(args.steps):
            batch = batches.batch(next(step))
            losses(**batch)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            done += len(batch["examples"].task)
        return done

    def naive() -> float:
        batch = batches.batch(next(step))
        naive_loss(model, batch["examples"], model.lm.get_input_embeddings()).backward()
        optimizer.step()
        optimizer.zero_grad()
        return len(batch["examples"].task)

    rates = alternate({"userllm": ours, "naive": naive}, args.rounds)
    write_result(
        "contextualization",
        {
            "examples_per_s": rates,
            "ratio": ratio(rates, "userllm", "naive"),
            "lm": model.reference.name,
            "trainable": trainable_parameters(model),
            "examples_per_step": config.contextualize.histories * config.contextualize.examples_per_history,
            "teacher": config.tasks["next_item"].teacher,
        },
        args.out,
    )


if __name__ == "__main__":
    main()
