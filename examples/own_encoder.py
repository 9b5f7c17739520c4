"""An encoder of your own inside User-LLM: a SASRec that RecTools trained, and a tiny language model that listens to it.

    pip install -e '.[bench]'   (in the clone)
    python examples/own_encoder.py

A minute on one core, without any download: the catalogue and its users are made up, and the language model has random
weights. What it shows is the protocol (``userllm.encoders.UserEncoder``): ``RecToolsSASRec`` below is all that has to
be written for a trained sequence model of another library.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import torch
from rectools import Columns
from rectools.dataset import Dataset as RecToolsDataset
from rectools.models import SASRecModel
from torch import Tensor
from torch.nn import functional as F

from userllm.data.collation import StoredHistories
from userllm.data.sources.movielens import FIELDS
from userllm.data.splits import Split, SplitConfig
from userllm.data.store import Dataset, Source, write_dataset
from userllm.data.vocabulary import Vocabulary
from userllm.encoders import UserEncoder
from userllm.evaluation.closed import ClosedEvaluator, EvaluationConfig
from userllm.events import HistoryBatch
from userllm.fusion.cross_attention import CrossAttentionConfig
from userllm.language_models.pretrained import LanguageModelConfig, load
from userllm.model import FusionConfig, UserLLM
from userllm.tasks import TaskConfig, build_task
from userllm.training.contextualize import ContextualizeConfig, contextualize
from userllm.training.strategy import apply_strategy
from userllm.training.trainer import OptimizationConfig, set_seed

MAX_LENGTH = 20


class RecToolsSASRec(UserEncoder):
    """A trained RecTools SASRec: one embedding per event, of the items alone.

    It is not ``causal`` in our sense, although its attention is: its positions count back from the latest event, so
    that the embedding of an event changes when others follow. Therefore userllm gives it each history cut off in time.
    """

    causal = False
    ranks_items = True

    def __init__(self, sasrec: SASRecModel, vocabulary: Vocabulary):
        super().__init__()
        self.sasrec = sasrec.torch_model
        self.max_length = sasrec.session_max_len
        self.width = sasrec.n_factors
        known = sasrec.data_preparator.item_id_map.to_internal
        items = vocabulary["item"].values
        # our vocabulary ids begin with padding and "unknown"; RecTools has 0 for padding, and drops what it never saw
        numbers = [0, 0, *(int(known[item]) if item in known.index else 0 for item in items)]
        self.register_buffer("numbers", torch.tensor(numbers))

    def forward(self, batch: HistoryBatch) -> tuple[Tensor, Tensor]:
        """Embeddings [B, S, U] and the batch's mask.

        userllm pads on the right; RecTools on the left, always to the same length, and its attention sees the padding.
        """
        items = F.pad(self.numbers[batch.fields["item"]], (0, self.max_length - batch.mask.shape[1]))
        places = torch.arange(self.max_length, device=items.device)
        shift = self.max_length - batch.lengths[:, None]
        sessions = items.gather(1, (places - shift) % self.max_length)
        states = self.sasrec.encode_sessions({"x": sessions}, self.sasrec.item_model.get_all_embeddings())
        back = (places[: batch.mask.shape[1]] + shift) % self.max_length
        return states.gather(1, back[..., None].expand(-1, -1, self.width)), batch.mask

    def next_item_scores(self, histories: HistoryBatch, rows: Tensor, ends: Tensor) -> Tensor:
        """Scores [E, items]; an item that RecTools never saw cannot be recommended."""
        embeddings, _ = self(histories.select(rows).prefixes(ends))
        items = self.sasrec.item_model.get_all_embeddings()
        scores = self.sasrec.similarity_module(
            embeddings[torch.arange(len(rows), device=rows.device), ends - 1], items
        )
        catalogue = self.numbers[2:]
        return scores[:, catalogue].masked_fill(catalogue == 0, -torch.inf)


def made_up_dataset(folder: Path) -> Dataset:
    """72 films of 6 genres, 300 people who stay with their genre four times out of five and see no film twice."""
    random = np.random.default_rng(0)
    genres = ["Comedy", "Crime", "Drama", "Musical", "War", "Western"]
    places = [
        "Harbour",
        "Mill",
        "Station",
        "Garden",
        "Bridge",
        "Tower",
        "Island",
        "Market",
        "Forest",
        "Palace",
        "Road",
        "Lake",
    ]
    films = [(f"The {genre} of the {place}", genre) for genre in genres for place in places]
    genre_of = np.array([genres.index(genre) for _, genre in films])
    rows = []
    for user in range(300):
        loyal, seen = random.integers(len(genres)), np.zeros(len(films), bool)
        for step in range(random.integers(8, 16)):
            wanted = (genre_of == loyal) if random.random() < 0.8 else np.ones(len(films), bool)
            choice = np.flatnonzero(wanted & ~seen if (wanted & ~seen).any() else ~seen)
            item = random.choice(choice)
            seen[item] = True
            rows.append((user, item, 1000 * step, 1 + 4 * (genre_of[item] == loyal)))
    return write_dataset(
        folder,
        pl.DataFrame(rows, schema=["user", "item", "time", "rating"], orient="row"),
        pl.DataFrame(
            {
                "id": [f"f{n}" for n in range(len(films))],
                "title": [title for title, _ in films],
                "genres": [[genre] for _, genre in films],
                "year": [1980] * len(films),
            }
        ),
        pl.DataFrame({"id": [f"u{n}" for n in range(300)]}),
        name="made up",
        source=Source("made up", "examples/own_encoder.py", "none", "0" * 64, "path"),
        fields=FIELDS,
    )


def train_sasrec(dataset: Dataset, split: Split) -> SASRecModel:
    """RecTools' SASRec on the very events that the split gives to training."""
    events = [
        (user, event.item, event.time)
        for user, end in zip(split.users.tolist(), split.train_end.tolist(), strict=True)
        for event in dataset.history(user, 0, end).events
    ]
    frame = pd.DataFrame(events, columns=[Columns.User, Columns.Item, "seconds"])
    frame[Columns.Datetime] = pd.to_datetime(frame.pop("seconds"), unit="s")
    frame[Columns.Weight] = 1.0
    model = SASRecModel(
        n_blocks=1, n_heads=2, n_factors=32, session_max_len=MAX_LENGTH, dropout_rate=0.1, loss="softmax",
        lr=3e-3, epochs=15, batch_size=32, dataloader_num_workers=0, verbose=0,
    )  # fmt: skip
    model.fit(RecToolsDataset.construct(frame))
    return model


def main(folder: Path) -> None:
    """Train the encoder with RecTools, contextualise a language model with it, ask, save, load, and ask again."""
    set_seed(0)
    dataset = made_up_dataset(folder / "dataset")
    split = SplitConfig().build(dataset)
    vocabulary = Vocabulary.from_dataset(dataset, ("item",))
    stored = StoredHistories(dataset, vocabulary)
    sasrec = train_sasrec(dataset, split)

    lm, tokenizer, reference = load(LanguageModelConfig(name="tiny-random-llama"))
    task = TaskConfig(prompt="The next film this person will watch is", teacher=0.5)
    model = UserLLM(
        lm,
        tokenizer,
        RecToolsSASRec(sasrec, vocabulary),
        FusionConfig(layers="last:2", events=8, cross_attention=CrossAttentionConfig(heads=2, head_width=16)),
        {"next_item": build_task("next_item", task, dataset.items)},
        stored.collator,
        reference,
        "proj",
    )
    apply_strategy(model, "proj", None)  # the SASRec and the language model stay as they are
    config = ContextualizeConfig(steps=150, optimization=OptimizationConfig(learning_rate=1e-2))
    contextualize(model, dataset, split, stored, config, folder / "contextualize", seed=0)

    evaluation = EvaluationConfig(users=100, list_length=10, beams=10)
    found = ClosedEvaluator(model, model.encoder, dataset, split, stored, evaluation, 0).evaluate("next_item")
    for system in ("user_llm", "user_llm_shuffled", "encoder", "popularity"):
        print(f"{system:>18}: recall@10 {found[system]['recall@10']['value']:.2f}")
    print(f"the right user over another: {found['gain_nats']['over_shuffled']['value']:.2f} nats per title")

    history = dataset.history(7)
    before = model.recommend(history, 3)
    model.save_pretrained(folder / "model")
    again = UserLLM.from_pretrained(folder / "model", encoder=RecToolsSASRec(sasrec, vocabulary))
    assert [one.item for one in again.recommend(history, 3)] == [one.item for one in before]
    print(f"has seen {[model.title(event.item) for event in history.events[-3:]]}")
    print(f"will see {[one.title for one in before]}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(scratch))
