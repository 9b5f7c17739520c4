"""UEM in miniature: a T5 with random weights learns from text histories which genres a user it has never met likes."""

import numpy as np
import polars as pl
import pytest
import torch
from transformers import T5ForConditionalGeneration

from userllm.data.collation import StoredHistories
from userllm.data.sources.movielens import FIELDS
from userllm.data.store import Source, write_dataset
from userllm.data.text_store import SentenceEncoderCard, TextStore
from userllm.data.vocabulary import Vocabulary
from userllm.encoders import TextConfig
from userllm.fusion.config import FusionConfig
from userllm.language_models.pretrained import LanguageModelConfig, load
from userllm.model import UserLLM, encoder_for
from userllm.tasks import TaskConfig, build_task
from userllm.training.strategy import apply_strategy

GENRES = ["Action", "Comedy", "Drama", "Sci-Fi"]
USERS, EVENTS, HELD_OUT, PROMPT = 200, 12, 40, "Which genres?"


def bag_of_genres(texts):
    """Stands in for a sentence encoder: which genres and which rating a text names."""
    facts = [[genre in t for genre in GENRES] + [t == str(n) for n in range(1, 6)] for t in texts]
    return np.array(facts, dtype=np.float32)


def taste(folder):
    """Users who each like some genres more than others, and rate everything 4 or 5."""
    rng = np.random.default_rng(5)
    rows = []
    for user in range(USERS):
        share = rng.dirichlet([0.4] * 4)
        for step in range(EVENTS):
            item = rng.choice(4, p=share) + 4 * rng.integers(10)
            rows.append((user, item, 1000 + step, rng.integers(4, 6)))
    numbers = range(40)
    items = pl.DataFrame(
        {
            "id": [f"m{n}" for n in numbers],
            "title": [f"Movie {n}" for n in numbers],
            "genres": [[GENRES[n % 4]] for n in numbers],
            "year": [1990] * 40,
        }
    )
    return write_dataset(
        folder,
        pl.DataFrame(rows, schema=["user", "item", "time", "rating"], orient="row"),
        items,
        pl.DataFrame({"id": [f"u{n}" for n in range(USERS)]}),
        name="taste",
        source=Source("made", "a test", "none", "0" * 64, "path"),
        fields=FIELDS,
    )


@pytest.mark.slow  # sixty steps
def test_it_learns_whose_genres_are_whose(tmp_path):
    dataset = taste(tmp_path / "taste")
    vocabulary = Vocabulary.from_dataset(dataset)
    stored = StoredHistories(dataset, vocabulary)
    torch.manual_seed(0)
    config = TextConfig(
        layers=1, width=32, heads=2, feed_forward=64, dropout=0.0, sentence_width=9, max_length=EVENTS,
        parts=["title", "rating"],
    )  # fmt: skip
    encoder = encoder_for(vocabulary, config)
    store = TextStore.open(tmp_path / "store", SentenceEncoderCard("bag", "0" * 64, 9))
    texts = config.texts(dataset.items, vocabulary)
    store.add([text for column in texts.values() for text in column], bag_of_genres)
    encoder.use(store, texts)
    tiny, tokenizer, reference = load(LanguageModelConfig("tiny-random-t5"))
    tiny.config.update({"initializer_factor": 1.0, "dropout_rate": 0.0})  # sizes to learn from
    lm = T5ForConditionalGeneration(tiny.config)
    task = build_task("genres", TaskConfig(kind="genre_preference", prompt=PROMPT), dataset.items)
    fusion = FusionConfig(kind="soft_prompt", events=EVENTS)
    model = UserLLM(lm, tokenizer, encoder, fusion, {"genres": task}, stored.collator, reference, "full")
    apply_strategy(model, "full", None)
    asked = task.examples(dataset, np.arange(USERS), dataset.lengths, EVENTS)
    targets = [example.target for example in asked]

    def losses(users, histories):
        context = model.context(stored.batch([(int(u), 0, EVENTS) for u in histories]))
        return model.text_losses([PROMPT] * len(users), [targets[u] for u in users], context)

    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=3e-3)
    model.train()
    for step in range(60):
        users = np.random.default_rng(step).choice(USERS - HELD_OUT, 32, replace=False)
        nll, tokens = losses(users, users)
        optimizer.zero_grad()
        (nll.sum() / tokens.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    new = np.arange(USERS - HELD_OUT, USERS)
    with torch.no_grad():
        own, other = losses(new, new)[0].mean(), losses(new, np.roll(new, 1))[0].mean()
    assert own < 0.4 * other
