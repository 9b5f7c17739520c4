"""Sentence embeddings: ours against ``SentenceTransformer.encode``, on the same texts with the same weights.

The texts are what a text encoder asks for (titles with genres, descriptions where a dataset has them), each distinct
text once; ``events_per_text`` says how many look-ups of the events one encoded text serves. Both sides encode the same
list, in float32, each with its default batching. Rates are per CPU second of the process, all threads together. The
largest difference between their vectors is told beside the rate.

    python benchmarks/bench_sentence_embeddings.py --config configs/uem-movielens-1m.yaml data.descriptions=FILE

Needs sentence-transformers.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from measure import alternate, argument_parser, ratio, write_result
from userllm.cli.configuration import load_config
from userllm.data.sources.by_name import prepare
from userllm.data.store import Dataset
from userllm.data.vocabulary import Vocabulary
from userllm.encoders import TextConfig
from userllm.language_models.sentences import find_sentence_encoder
from userllm.pipeline import Run


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--texts", type=int, default=512, help="drawn from all distinct texts")
    args = parser.parse_args()
    config, plain = load_config(args.config, ["name=benchmark", *args.overrides])
    if not isinstance(config.encoder, TextConfig):
        raise SystemExit("the configuration's encoder.kind is not text")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    folder = config.data.folder
    if folder is None:
        folder = Run(config, plain).folder / "dataset"
        if not (folder / "card.json").is_file():
            prepare(str(config.data.release), config.data.path, folder, descriptions=config.data.descriptions)
    dataset = Dataset.open(folder)
    vocabulary = Vocabulary.from_dataset(dataset, tuple(config.data.fields))
    columns = config.encoder.texts(dataset.items, vocabulary)
    distinct = sorted({text for column in columns.values() for text in column if text is not None})
    drawn = np.random.default_rng(0).choice(len(distinct), min(args.texts, len(distinct)), replace=False)
    texts = [distinct[n] for n in drawn]
    files = find_sentence_encoder(config.encoder.sentences)
    ours, theirs = files.load(), SentenceTransformer(str(files.folder), device="cpu")
    difference = float(np.abs(ours.encode(texts[:64]) - theirs.encode(texts[:64])).max())

    def ours_encode() -> float:
        return float(len(ours.encode(texts)))

    def theirs_encode() -> float:
        return float(len(theirs.encode(texts)))

    ways = {"userllm": ours_encode, "sentence_transformers": theirs_encode}
    rates = alternate(ways, args.rounds, time.process_time)
    write_result(
        "sentence_embeddings",
        {
            "encoder": config.encoder.sentences,
            "texts": len(texts),
            "distinct_texts": len(distinct),
            "events_per_text": dataset.num_events * len(columns) / len(distinct),
            "texts_per_cpu_s": rates,
            "ratio": ratio(rates, "userllm", "sentence_transformers"),
            "largest_difference": difference,
        },
        args.out,
    )


if __name__ == "__main__":
    main()
