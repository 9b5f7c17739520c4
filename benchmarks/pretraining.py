"""Encoder pretraining against RecTools' SASRec: events/s, same width, depth, history length and full softmax, one run.

Both train on real ML-1M batches in this very process, in turn. ``rectools`` is the library's training step as
it is shipped (logits at padding positions included); ``rectools_targets`` is the same step with logits at
target positions only (see ``rectools_sasrec.py``), which is kinder to RecTools than its release. Events are
real, non-padding target events for all three. userllm also reads and predicts rating and genres, which
RecTools does not.

    .venv-bench/bin/python benchmarks/pretraining.py --config configs/movielens-1m.yaml
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from rectools.models import SASRecModel

import rectools_sasrec as reference
from measure import alternate, argument_parser, ratio, write_result
from userllm.cli.configuration import load_config
from userllm.model import encoder_for
from userllm.pipeline import Run
from userllm.training.pretrain import NextEventLosses, PretrainBatches, PretrainConfig


def rectools_way(dataset, events: int, width: int, blocks: int, length: int, sequences: int, positions: str):
    """A way that trains RecTools on about ``events`` events."""
    step = reference.LOSS_POSITIONS[positions]
    torch.manual_seed(0)
    model = SASRecModel(
        n_blocks=blocks, n_factors=width, n_heads=2, session_max_len=length, batch_size=sequences, lr=1e-3,
        lightning_module_type=step,
    )  # fmt: skip
    model._build_model_from_dataset(dataset)
    module = model.lightning_model
    module._xavier_normal_init()
    module.log = lambda *_, **__: None
    optimizer = module.configure_optimizers()
    batches = itertools.chain.from_iterable(
        model.data_preparator.get_dataloader_train() for _ in itertools.count()
    )

    def way() -> float:
        done = 0
        while done < events:
            batch = next(batches)
            optimizer.zero_grad()
            step.training_step(module, batch, 0).backward()
            optimizer.step()
            done += int((batch["y"] > 0).sum())
        return done

    return way


def userllm_way(run: Run, config: PretrainConfig, events: int) -> Callable[[], float]:
    """A way that trains userllm's encoder on about ``events`` events."""
    encoder = encoder_for(run.vocabulary, run.config.encoder)
    model = NextEventLosses(encoder).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), fused=True)
    batches = PretrainBatches(run.stored, run.split, encoder.max_length, config, seed=0)
    numbers = itertools.count()

    def way() -> float:
        done = 0
        while done < events:
            batch = batches.batch(next(numbers) % batches.per_epoch)
            optimizer.zero_grad()
            model(**batch)["loss"].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimization.gradient_clip)
            optimizer.step()
            done += int(batch["targets"].mask.sum())
        return done

    return way


def main() -> None:
    """See the module."""
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--events", type=int, default=20000, help="events per way and round")
    parser.add_argument("--sequences", type=int, default=32, help="RecTools' batch, in sequences")
    args = parser.parse_args()
    config, plain = load_config(args.config, ["name=benchmark", *args.overrides])
    run = Run(config, plain)
    run.do_data()
    assert config.pretrain is not None
    dataset = reference.train_dataset(reference.read_histories(run.dataset.folder))
    size = config.encoder
    theirs = (dataset, args.events, size.width, size.layers, size.max_length, args.sequences)
    rates = alternate(
        {
            "userllm": userllm_way(run, config.pretrain, args.events),
            "rectools": rectools_way(*theirs, "all"),
            "rectools_targets": rectools_way(*theirs, "targets"),
        },
        args.rounds,
    )
    write_result(
        "pretraining",
        {
            "events_per_s": rates,
            "over_rectools": ratio(rates, "userllm", "rectools"),
            "over_rectools_targets": ratio(rates, "userllm", "rectools_targets"),
            "width": size.width,
            "layers": size.layers,
            "history": size.max_length,
            "rectools_sequences_per_batch": args.sequences,
            "userllm_events_per_batch": config.pretrain.batch.events,
        },
        args.out,
    )


if __name__ == "__main__":
    main()
