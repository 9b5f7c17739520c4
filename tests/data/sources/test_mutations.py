"""Damaged files: prepared rightly, row by row accounted for, or refused in one line. Fast and careful reading agree."""

import csv
import gzip
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from userllm.data import Dataset
from userllm.data.sources.csv_rows import CsvReader, csv_rows
from userllm.data.sources.table import prepare_table
from userllm.data.sources.table_config import TableConfig
from userllm.errors import UserError

from .mutations import mutated

CONFIG = TableConfig(
    path=["?"],
    user="u",
    item="i",
    time="t",
    time_unit="s",
    fields=["r:number"],
    text=["x"],
    on_bad_rows="skip",
)
HEADER = ["u", "i", "t", "r", "x"]
MUTATIONS = 600

fragments = st.sampled_from(
    ["a", "1", ",", ",", "\n", "\n", '"', '""', "\r\n", "\r", " ", "é", "\0", "\t", "b,c,d"]
)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(fragments, max_size=25).map("".join), st.booleans())
def test_a_block_that_is_read_at_once_is_read_as_line_by_line(tmp_path, text, quoted):
    """Whatever the bytes: where the fast way answers, the careful one says the same."""
    reader = CsvReader("f", ",", quoted, 3, {"b": 1, "a": 0, "c": 2})
    block = text.encode()
    fast = reader.fast(block, 5) if block else None
    if fast is None:
        return
    careful, tail = reader.careful(block, 5, last=True)
    assert tail == b""
    assert careful.rejected == []
    blank = [pl.col(name).fill_null("") for name in fast.frame.columns]
    assert fast.frame.select(blank).rows() == careful.frame.select(blank).rows()
    assert fast.lines().tolist() == careful.lines().tolist()


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(fragments, max_size=30).map("".join), st.integers(1, 12))
def test_blocks_of_any_size_give_the_same_rows(tmp_path, text, size):
    file = tmp_path / "f.csv"
    file.write_bytes(b"a,b,c\n" + text.encode())

    def read(size: int):
        rows, lines, bad = [], [], []
        for part in csv_rows(file, ",", True, None, ["a", "b", "c"], size):
            rows += part.frame.select(pl.all().fill_null("")).rows()
            lines += part.lines().tolist()
            bad += part.rejected
        return rows, lines, bad

    assert read(size) == read(1 << 20)


def rows(random: np.random.Generator) -> list[list]:
    texts = ["fine", "", 'with "quotes"', "a, comma", "two\nlines", "größe", "x" * 300]
    return [
        [f"u{random.integers(9)}", f"i{random.integers(15)}", int(random.integers(10**9)), int(random.integers(1, 6)),
         str(random.choice(texts))]
        for _ in range(int(random.integers(1, 40)))
    ]  # fmt: skip


def write(file: Path, kind: str, table: list[list]) -> None:
    if kind == "parquet":
        pl.DataFrame(table, schema=HEADER, orient="row").write_parquet(file)
    elif kind == "jsonl":
        file.write_text("".join(json.dumps(dict(zip(HEADER, row, strict=True))) + "\n" for row in table))
    else:
        with open(file, "w", newline="", encoding="utf-8") as out:
            if kind == "csv":
                csv.writer(out).writerows([HEADER, *table])
            else:
                clean = [
                    [str(v).replace("\n", " ").replace('"', "'") for v in row] for row in [HEADER, *table]
                ]
                out.write("".join("\t".join(row) + "\n" for row in clean))


def outcome(config: TableConfig, out: Path, file: Path) -> Dataset | str:
    try:
        dataset = prepare_table(config, out)
    except UserError as error:
        message = str(error)
        assert "\n" not in message
        assert len(message) < 1000
        assert file.name in message
        return message
    counts = dataset.card.rows
    assert counts.read == counts.kept + counts.rejected
    assert counts.kept == dataset.num_events
    rejects = dataset.files / "rejects.csv"
    written = []
    if rejects.exists():
        with open(rejects, newline="", encoding="utf-8") as lines:
            written = list(csv.DictReader(lines))
    assert len(written) == counts.rejected
    assert all(int(bad["line"]) >= 1 and bad["reason"] and bad["file"] == str(file) for bad in written)
    return dataset


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet", "csv.gz", "csv.zst"])
def test_mutated_files(kind, tmp_path):
    """Prepared, with every row accounted for and the same in one block or many; or refused in one line."""
    prepared = rejected = 0
    for seed in range(MUTATIONS // 6):
        random = np.random.default_rng([seed, len(kind)])
        file = tmp_path / f"log.{kind}"
        plain, _, packed = kind.partition(".")
        write(file, plain, rows(random))
        raw = file.read_bytes()
        inside = not packed or random.integers(3) > 0  # of packed files mostly what is packed is damaged
        raw = mutated(raw, random) if inside else raw
        raw = gzip.compress(raw) if packed == "gz" else zstandard.compress(raw) if packed else raw
        raw = raw if inside else mutated(raw, random)
        file.write_bytes(raw)
        config = replace(CONFIG, path=[str(file)])
        found = outcome(config, tmp_path / "out", file)
        small = outcome(replace(config, memory="4kB"), tmp_path / "small", file)
        strict = outcome(replace(config, on_bad_rows="error"), tmp_path / "strict", file)
        if isinstance(found, str):
            assert isinstance(small, str), seed
            assert isinstance(strict, str), seed
            continue
        prepared += 1
        rejected += found.card.rows.rejected > 0
        assert isinstance(small, Dataset), (seed, small)
        assert small.card.fingerprint == found.card.fingerprint, seed
        assert small.card.rows == found.card.rows, seed
        assert isinstance(strict, str) == (found.card.rows.rejected > 0), (seed, strict)
        if plain == "jsonl" or (plain in ("csv", "tsv") and not packed and b'"' not in raw):
            lines = raw.removeprefix(b"\xef\xbb\xbf").split(b"\n")[plain != "jsonl" :]
            assert found.card.rows.read == sum(bool(line.strip()) for line in lines), seed
        for folder in ("out", "small", "strict"):
            assert not any(name.startswith(f".{folder}.") for name in os.listdir(tmp_path))
    assert prepared > (3 if plain == "parquet" else 10)
    assert rejected > 5 or plain == "parquet"
