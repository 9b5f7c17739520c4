"""Reference number: RecTools' SASRec on leave-last-out next-item ranking.

Needs an environment of its own (`pip install "rectools[torch]==0.19.0" polars pyarrow`); nothing here
imports `userllm`, so the number does not depend on our code.

Protocol. All users with at least 5 events. A user's events are ordered by time, ties by source row order.
The last event is the test target, the last but one the validation target. The model is trained once, on
the train events (all but the last two), and never on a target. The history is everything before the
target: the train events for validation, and the train events plus the validation event for test. The
model reads the last `--max-len` of them. Ranking is over the full catalogue of items the model was
trained on; items of the history are removed; a target outside that catalogue, or already in the history,
is a miss. Ties in the score count against the target. The epoch reported under "best" has the highest
validation recall@10; test numbers play no part in choosing it.

How RecTools trains. An epoch shows each user once, as one sequence: the user's last `max_len + 1` train
events, left padded to `max_len` inputs and `max_len` next-item targets. Older events are never seen, and
an item found only there is outside the model's catalogue (counted in "data"). "Training events" are the
non-padding targets.

`--loss-positions targets` leaves out the logits of padding positions, which RecTools computes and its
loss then ignores: the same loss and gradients to float rounding (`--check-loss`) in less time. The
default `all` is RecTools' own training step; the speed of RecTools as shipped must be measured with it.

Costs. `train_wall_s` and `train_cpu_s` (user + system time of the process, all threads) run from the
first batch and leave out our evaluations; `wall_s` is everything since the first batch.
"""

import argparse
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytorch_lightning as lightning
import torch
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel
from rectools.models.nn.transformers.lightning import TransformerLightningModule

MIN_EVENTS = 5
PADDING = 0  # RecTools' internal id of its padding token

Histories = list[np.ndarray]  # per user: item ids in order, targets included


def read_histories(path: Path) -> Histories:
    """Item ids of each user in time order, ties by source row order.

    `path` is a prepared dataset, or a RecBole `.inter` file.
    """
    if path.is_dir():
        files = path / json.loads((path / "card.json").read_text())["files"]
        found = np.split(np.load(files / "events" / "item.npy"), np.load(files / "offsets.npy")[1:-1])
    else:
        raw = pl.read_csv(path, separator="\t", quote_char=None)
        raw = raw.rename({name: name.split(":")[0] for name in raw.columns})
        events = raw.select(
            user=pl.col("user_id").rank("dense"),
            item=pl.col("item_id").rank("dense"),
            time=pl.col("timestamp").cast(pl.Int64),
        )
        events = events.sort("user", "time", maintain_order=True)
        found = events.group_by("user", maintain_order=True).agg("item")["item"].to_list()
    histories = [np.asarray(items, dtype=np.int64) for items in found]
    return [history for history in histories if len(history) >= MIN_EVENTS]


def train_dataset(histories: Histories) -> Dataset:
    """RecTools dataset of the train events.

    RecTools sorts by datetime itself, so each user's events get strictly increasing made-up days: no tie
    is left for its sort to decide. Weights are 1: RecTools weighs the loss by them.
    """
    parts = [history[:-2] for history in histories]
    lengths = [len(part) for part in parts]
    ranks = np.concatenate([np.arange(length) for length in lengths])
    return Dataset.construct(
        pd.DataFrame(
            {
                Columns.User: np.repeat(np.arange(len(parts)), lengths),
                Columns.Item: np.concatenate(parts),
                Columns.Weight: 1.0,
                Columns.Datetime: np.datetime64("2000-01-01", "ns") + ranks.astype("timedelta64[D]"),
            }
        )
    )


def target_ranks(
    model: torch.nn.Module, histories: Histories, targets: np.ndarray, max_len: int, batch_size: int = 256
) -> np.ndarray:
    """1-based rank of each target among the unseen catalogue; 0 where it cannot be ranked.

    `histories` and `targets` hold RecTools' internal ids; -1 is an item unknown to the model.
    """
    ranks = np.zeros(len(histories), dtype=np.int64)
    with torch.inference_mode():
        item_embeddings = model.item_model.get_all_embeddings()
        for start in range(0, len(histories), batch_size):
            batch = [history[history > PADDING] for history in histories[start : start + batch_size]]
            inputs = np.full((len(batch), max_len), PADDING, dtype=np.int64)
            for row, history in enumerate(batch):
                if len(history):
                    inputs[row, -len(history[-max_len:]) :] = history[-max_len:]
            encoded = model.encode_sessions({"x": torch.from_numpy(inputs)}, item_embeddings)[:, -1]
            scores = model.similarity_module(encoded, item_embeddings)
            scores[:, PADDING] = -torch.inf
            seen_rows = np.repeat(np.arange(len(batch)), [len(history) for history in batch])
            scores[torch.from_numpy(seen_rows), torch.from_numpy(np.concatenate(batch))] = -torch.inf
            target = torch.from_numpy(targets[start : start + batch_size])
            target_scores = scores.gather(1, target.clamp(min=0)[:, None])
            found = (target > PADDING) & torch.isfinite(target_scores[:, 0])
            rank = (scores >= target_scores).sum(1)  # the target itself makes it 1-based
            ranks[start : start + batch_size] = torch.where(found, rank, 0).numpy()
    return ranks


def ranking_metrics(ranks: np.ndarray) -> dict[str, float]:
    """Means over users: recall@1, 5 and 10, ndcg@10, mrr."""
    found = ranks > 0
    gain = np.where(found & (ranks <= 10), 1 / np.log2(ranks + 1, where=found, out=np.ones(len(ranks))), 0)
    metrics = {f"recall@{k}": float((found & (ranks <= k)).mean()) for k in (1, 5, 10)}
    return metrics | {
        "ndcg@10": float(gain.mean()),
        "mrr": float(np.divide(1, ranks, where=found, out=np.zeros(len(ranks))).mean()),
    }


def write_atomically(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)


class TargetPositionsModule(TransformerLightningModule):
    """RecTools' module with the softmax loss computed at the target positions only.

    RecTools scores every position against the catalogue, then drops the padding ones from the loss. Dropping
    them before scoring gives the same loss and gradients (to float rounding) for unit weights.
    """

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        item_embeddings = self.torch_model.item_model.get_all_embeddings()
        encoded = self.torch_model.encode_sessions(batch, item_embeddings)
        is_target = batch["y"] != PADDING
        logits = self.torch_model.similarity_module(encoded[is_target], item_embeddings) / self.logits_t
        loss = torch.nn.functional.cross_entropy(logits, batch["y"][is_target])
        self.log(self.train_loss_name, loss, on_step=False, on_epoch=True)
        return loss


def check_same_loss(module: TransformerLightningModule, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest difference of loss and gradients of the two training steps on one batch, without dropout."""
    module.eval()
    losses, gradients = [], []
    for step in (TransformerLightningModule.training_step, TargetPositionsModule.training_step):
        module.zero_grad()
        loss = step(module, batch, 0)
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append([parameter.grad.clone() for parameter in module.parameters()])
    module.zero_grad()
    module.train()
    pairs = list(zip(*gradients, strict=True))
    return {
        "loss": losses[0],
        "loss_difference": abs(losses[0] - losses[1]),
        "largest_gradient": max(float(first.abs().max()) for first, _ in pairs),
        "largest_gradient_difference": max(float((first - second).abs().max()) for first, second in pairs),
    }


class Evaluation(lightning.Callback):
    """After every `every` epochs: rank, record, write `out`, and stop on patience or at the time limit.

    The test ranks of the best epoch go to `<out>.ranks.npz` (one per user, in user order).
    """

    def __init__(self, histories: Histories, report: dict[str, Any], arguments: argparse.Namespace) -> None:
        self.histories = histories
        self.report = report
        self.arguments = arguments
        self.internal: Histories = []
        self.events = 0
        self.evaluation_wall = 0.0
        self.evaluation_cpu = 0.0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        ids = pl_module.data_preparator.item_id_map.to_internal
        lookup = np.full(max(int(history.max()) for history in self.histories) + 1, -1, dtype=np.int64)
        known = [
            item for item in ids.index if not isinstance(item, str)
        ]  # the padding token is the only string
        lookup[np.asarray(known, dtype=np.int64)] = ids.loc[known].to_numpy()
        self.internal = [lookup[history] for history in self.histories]
        train_items = np.unique(np.concatenate([history[:-2] for history in self.histories]))
        self.report["data"] = {
            "users": len(self.histories),
            "events": sum(map(len, self.histories)),
            "items_in_train_events": len(train_items),
            "items_in_model_catalogue": len(known),
            "validation_targets_outside_catalogue": sum(int(history[-2] < 0) for history in self.internal),
            "test_targets_outside_catalogue": sum(int(history[-1] < 0) for history in self.internal),
            "parameters": sum(parameter.numel() for parameter in pl_module.torch_model.parameters()),
        }
        if self.arguments.check_loss:
            report = check_same_loss(pl_module, next(iter(trainer.train_dataloader)))
            self.report["same_loss"] = report
            print(f"same loss: {report}", flush=True)
        self.start_wall, self.start_cpu = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.events += int((batch["y"] != PADDING).sum())
        if self.arguments.verbose:
            elapsed = time.perf_counter() - self.start_wall
            cpu = time.process_time() - self.start_cpu
            loss = float(outputs["loss"])
            cost = f"wall {elapsed:.1f} s cpu {cpu:.1f} s events {self.events}"
            print(f"batch {batch_idx} loss {loss:.4f} {cost}", flush=True)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        if epoch % self.arguments.every:
            return
        wall, cpu = time.perf_counter(), time.process_time()
        train_wall = wall - self.start_wall - self.evaluation_wall
        train_cpu = cpu - self.start_cpu - self.evaluation_cpu
        model = pl_module.torch_model
        model.eval()
        ranks = {}
        for name, position in (("validation", -2), ("test", -1)):
            targets = np.array([history[position] for history in self.internal])
            before = [history[:position] for history in self.internal]
            ranks[name] = target_ranks(model, before, targets, self.arguments.max_len)
        model.train()
        self.evaluation_wall += time.perf_counter() - wall
        self.evaluation_cpu += time.process_time() - cpu
        self._record(
            {
                "epoch": epoch,
                "step": trainer.global_step,
                "train_loss": float(trainer.callback_metrics["train_loss"]),
                "wall_s": time.perf_counter() - self.start_wall,
                "train_wall_s": train_wall,
                "train_cpu_s": train_cpu,
                "train_events": self.events,
                "train_events_per_s": self.events / train_wall,
                "validation": ranking_metrics(ranks["validation"]),
                "test": ranking_metrics(ranks["test"]),
            },
            ranks["test"],
        )
        if self.report["stopped"] is not None:
            trainer.should_stop = True

    def _record(self, entry: dict[str, Any], test_ranks: np.ndarray) -> None:
        curve = self.report["curve"]
        curve.append(entry)
        best = max(range(len(curve)), key=lambda index: curve[index]["validation"]["recall@10"])
        self.report["best"] = curve[best]
        out = self.arguments.out
        if best == len(curve) - 1:
            np.savez_compressed(out.with_name(out.name + ".ranks.npz"), test=test_ranks)
        if len(curve) - 1 - best >= self.arguments.patience:
            self.report["stopped"] = "patience"
        elif entry["epoch"] + self.arguments.every > self.arguments.epochs:
            self.report["stopped"] = "max epochs: not converged"
        elif entry["wall_s"] > self.arguments.max_minutes * 60:
            self.report["stopped"] = "time limit: not converged"
        write_atomically(out, self.report)
        print(
            f"epoch {entry['epoch']} loss {entry['train_loss']:.4f} "
            f"validation recall@10 {entry['validation']['recall@10']:.4f} "
            f"test recall@10 {entry['test']['recall@10']:.4f} ndcg@10 {entry['test']['ndcg@10']:.4f} "
            f"wall {entry['wall_s']:.0f} s, {entry['train_events_per_s']:.0f} events/s",
            flush=True,
        )


LOSS_POSITIONS = {"all": TransformerLightningModule, "targets": TargetPositionsModule}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="RecTools SASRec reference, leave-last-out, full ranking.")
    parser.add_argument(
        "--events", type=Path, required=True, help="a prepared dataset or a RecBole .inter file"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="JSON report, rewritten after each evaluation"
    )
    parser.add_argument("--max-len", type=int, default=200)
    parser.add_argument("--factors", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=40, help="at most this many")
    parser.add_argument("--every", type=int, default=1, help="epochs between evaluations")
    parser.add_argument(
        "--patience", type=int, default=4, help="evaluations without a better validation recall@10"
    )
    parser.add_argument(
        "--max-minutes", type=float, default=float("inf"), help="stop after the epoch that passes it"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--loss-positions", choices=tuple(LOSS_POSITIONS), default="all", help="all: RecTools as shipped"
    )
    parser.add_argument("--check-loss", action="store_true", help="compare both choices on a first batch")
    parser.add_argument("--verbose", action="store_true", help="print each batch")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    lightning.seed_everything(arguments.seed)
    histories = read_histories(arguments.events)
    report: dict[str, Any] = {
        "model": "RecTools SASRecModel, softmax loss over the full catalogue, Adam betas (0.9, 0.98)",
        "versions": {name: version(name) for name in ("rectools", "torch", "pytorch-lightning")}
        | {"python": platform.python_version()},
        "settings": {
            name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()
        },
        "data": None,
        "stopped": None,  # None: still running, or killed
        "best": None,
        "curve": [],
    }
    if arguments.max_minutes == float("inf"):
        report["settings"]["max_minutes"] = None  # JSON has no infinity

    def trainer() -> lightning.Trainer:
        return lightning.Trainer(
            max_epochs=arguments.epochs,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[Evaluation(histories, report, arguments)],
        )

    model = SASRecModel(
        n_blocks=arguments.blocks,
        n_factors=arguments.factors,
        n_heads=arguments.heads,
        session_max_len=arguments.max_len,
        dropout_rate=arguments.dropout,
        loss="softmax",
        lr=arguments.lr,
        batch_size=arguments.batch_size,
        dataloader_num_workers=0,  # keeps the cost of batching inside this process's CPU time
        lightning_module_type=LOSS_POSITIONS[arguments.loss_positions],
        get_trainer_func=trainer,
    )
    model.fit(train_dataset(histories))


if __name__ == "__main__":
    main()
