"""Preparing a large event log: seconds, peak memory, the same in pandas, and how soon training can start.

    python benchmarks/bench_prepare.py                                # makes the synthetic log of 20 million rows first
    python benchmarks/bench_prepare.py --log DIR --rounds 1           # on what synthetic_log.py wrote into DIR

Every way runs in a process of its own, in turns, so that one's peak memory is not another's. The first batch is timed
in a fresh process, too: open the dataset, split, vocabulary, one training batch.

Two preparations, each against pandas: as MovieLens, whose ids are whole numbers (userllm, pandas), and as anybody's
table, whose ids are text (userllm_table, pandas_text).

What pandas does is what the task needs and no more, as somebody would write it who knows pandas: read the columns with
their types, check them, look the items up in the catalogue, number users by first appearance, sort by user and time
keeping ties in order, write a .npy file per column, where each user's events begin, and the tables of users and items
with genres (and, of MovieLens, year), and hash what a fingerprint is made of. That is less than userllm does, so there
is a second way (pandas_whole, pandas_text_whole) that brings what the cards of userllm's datasets hold besides: the
checksum of the raw files and, of a table, how many events repeat an earlier pair of user and item, and how many of
those at the same second.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MEMORY = "2GiB"


def with_userllm(log: Path, out: Path, memory: str) -> dict[str, float | str]:
    """The command `userllm data prepare movielens --path LOG --memory MEMORY`."""
    from userllm.data.build import bytes_of
    from userllm.data.sources.movielens import prepare_movielens

    card = prepare_movielens(log, out, memory=bytes_of(memory)).card
    return {"events": card.events, "users": card.users, "items": card.items, "fingerprint": card.fingerprint}


def with_table(log: Path, out: Path, memory: str) -> dict[str, float | str]:
    """The command `userllm data prepare table --path LOG/ratings.csv --user userId ...`."""
    from userllm.data.sources.table import prepare_table
    from userllm.data.sources.table_config import ItemsConfig, TableConfig

    items = ItemsConfig(path=[str(log / "movies.csv")], key="movieId", title="title", category="genres")
    config = TableConfig(
        path=[str(log / "ratings.csv")],
        user="userId",
        item="movieId",
        time="timestamp",
        fields=["rating:number"],
        items=items,
        memory=memory,
    )
    card = prepare_table(config, out).card
    return {"events": card.events, "users": card.users, "items": card.items, "fingerprint": card.fingerprint}


def with_pandas(
    log: Path, out: Path, memory: str, ids: str = "int64", years: bool = True
) -> dict[str, float | str]:
    """See the module; ``memory`` has no meaning to pandas. ids: their type."""
    import hashlib

    import numpy as np
    import pandas as pd

    types = {"userId": ids, "movieId": ids, "rating": "float32", "timestamp": "int64"}
    events = pd.read_csv(log / "ratings.csv", dtype=types)
    movies = pd.read_csv(log / "movies.csv", dtype={"movieId": ids})
    if events.isna().any().any() or not np.isfinite(events["rating"]).all():
        raise SystemExit("bad rows")
    if not movies["movieId"].is_unique or movies["title"].isna().any():
        raise SystemExit("bad movies")
    row = pd.Series(np.arange(len(movies), dtype="int32"), index=movies["movieId"])
    item = events["movieId"].map(row)
    if item.isna().any():
        raise SystemExit("items without a title")
    user, users = pd.factorize(events["userId"])
    columns = {"user": user.astype("int32"), "item": item.astype("int32").to_numpy()}
    columns |= {"time": events["timestamp"].to_numpy(), "rating": events["rating"].to_numpy()}
    del events
    table = pd.DataFrame(columns).sort_values(["user", "time"], kind="stable")
    digest = hashlib.sha256()
    out.mkdir(parents=True)
    titles = movies["title"].map(lambda title: hashlib.sha256(title.encode()).digest()[:8]).to_numpy()
    hashed = np.frombuffer(b"".join(titles), dtype="<u8")
    for name in sorted(table.columns):
        column = table[name].to_numpy()
        np.save(out / f"{name}.npy", column)
        digest.update(f"{name}:".encode())
        digest.update(np.ascontiguousarray(hashed[column] if name == "item" else column).data)
    np.save(out / "offsets.npy", np.concatenate([[0], np.cumsum(np.bincount(table["user"]))]))
    np.save(out / "ratings.npy", np.sort(table["rating"].unique()))
    pd.Series(users).astype(str).to_csv(out / "users.csv")
    movies["genres"] = movies["genres"].str.split("|")
    if years:
        movies["year"] = movies["title"].str.extract(r"\((\d{4})\)\s*$", expand=False)
    movies.to_json(out / "items.jsonl", orient="records", lines=True)
    return {
        "events": len(table),
        "users": len(users),
        "items": len(movies),
        "fingerprint": digest.hexdigest(),
    }


def with_pandas_text(log: Path, out: Path, memory: str) -> dict[str, float | str]:
    """The same with ids that are text."""
    return with_pandas(log, out, memory, ids="str", years=False)


def with_pandas_whole(log: Path, out: Path, memory: str) -> dict[str, float | str]:
    """``with_pandas``, and the checksum of the raw files."""
    return with_pandas(log, out, memory) | {"raw": _checksum(log)}


def with_pandas_text_whole(log: Path, out: Path, memory: str) -> dict[str, float | str]:
    """``with_pandas_text``, the checksum of the raw files, and the events that repeat another."""
    import numpy as np
    import pandas as pd

    found = with_pandas_text(log, out, memory)
    table = pd.DataFrame({name: np.load(out / f"{name}.npy") for name in ("user", "item", "time")})
    repeats = {
        "pairs": int(table.duplicated(["user", "item"]).sum()),
        "same_second": int(table.duplicated().sum()),
    }
    return found | {"raw": _checksum(log)} | repeats


def _checksum(log: Path) -> str:
    import hashlib

    digest = hashlib.sha256()
    for name in ("movies.csv", "ratings.csv"):
        with (log / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def first_batch(log: Path, out: Path, memory: str) -> dict[str, float | str]:
    """Of a dataset that is prepared already, ``log``: seconds from opening it to a batch, imports apart."""
    from userllm.data import SplitConfig, StoredHistories, Vocabulary
    from userllm.data.store import Dataset
    from userllm.training.pretrain import PretrainBatches, PretrainConfig

    began = time.perf_counter()
    dataset = Dataset.open(log)
    opened = time.perf_counter() - began
    split = SplitConfig().build(dataset)
    stored = StoredHistories(dataset, Vocabulary.from_dataset(dataset, ("item", "rating", "genres")))
    batches = PretrainBatches(stored, split, 200, PretrainConfig(), 0)
    batch = batches.batch(0)
    seconds = time.perf_counter() - began
    return {"open_s": opened, "first_batch_s": seconds, "targets": int(batch["targets"].mask.sum())}


WAYS = {
    "userllm": with_userllm,
    "pandas": with_pandas,
    "userllm_table": with_table,
    "pandas_text": with_pandas_text,
    "pandas_whole": with_pandas_whole,
    "pandas_text_whole": with_pandas_text_whole,
    "first_batch": first_batch,
}
AGAINST = {
    "userllm": ("pandas", "pandas_whole"),
    "userllm_table": ("pandas_text", "pandas_text_whole"),
}


def alone(way: str, log: Path, memory: str, out: Path) -> dict[str, float | str]:
    """One way in a process of its own: what it returns, wall seconds with imports, peak memory in MiB."""
    command = [
        sys.executable,
        __file__,
        "--way",
        way,
        "--log",
        str(log),
        "--memory",
        memory,
        "--out",
        str(out),
    ]
    began = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    found = json.loads(done.stdout.splitlines()[-1]) | {"process_s": seconds}
    print(f"  {way}: {found}", flush=True)
    return found


def peak_mib() -> float:
    """Largest resident memory of this process; what getrusage says may be its parent's."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    return int(line.split()[1]) / 1024


def measure_ways(log: Path, args: argparse.Namespace) -> None:
    """Every way in turns, and the result file."""
    from measure import ratio, write_result

    ways = ["userllm"] if args.without_pandas else list(WAYS)[:-1]
    results: dict[str, list[dict]] = {way: [] for way in [*ways, "first_batch"]}
    for number in range(args.rounds):
        print(f"round {number}", flush=True)
        with tempfile.TemporaryDirectory(dir=log.parent) as scratch:
            for way in ways:
                results[way].append(alone(way, log, args.memory, Path(scratch) / way))
            results["first_batch"].append(
                alone("first_batch", Path(scratch) / "userllm", args.memory, args.out)
            )
    facts = {
        "log": "synthetic, see benchmarks/synthetic_log.py",
        "memory_option": args.memory,
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "results": results,
    }
    if not args.without_pandas:
        for measure in ("seconds", "cpu_s"):
            rates = {way: [one["events"] / one[measure] for one in results[way]] for way in ways}
            facts[f"over_pandas_{measure}"] = {
                other: ratio(rates, own, other) for own, others in AGAINST.items() for other in others
            }
    write_result(args.name, facts, args.out)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--log", type=Path, help="what synthetic_log.py wrote (default: made in a temporary folder)"
    )
    parser.add_argument("--memory", default=MEMORY)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--without-pandas", action="store_true", help="for a log that pandas has no room for")
    parser.add_argument("--name", default="prepare", help="of the result")
    parser.add_argument("--out", type=Path, default=Path("docs/results/benchmarks"))
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        began = time.perf_counter()
        found = WAYS[args.way](args.log, args.out, args.memory)
        spent = {"seconds": time.perf_counter() - began, "cpu_s": time.process_time()}
        print(json.dumps(found | spent | {"peak_mib": round(peak_mib(), 1)}))
    elif args.log is not None:
        measure_ways(args.log, args)
    else:
        from synthetic_log import EVENTS, ITEMS, USERS, write_log

        with tempfile.TemporaryDirectory() as folder:
            write_log(Path(folder) / "log", EVENTS, USERS, ITEMS)
            measure_ways(Path(folder) / "log", args)


if __name__ == "__main__":
    main()
