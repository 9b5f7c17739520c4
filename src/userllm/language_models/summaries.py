"""Short summaries by a language model, each written once: kept on disk by model, prompt and length.

What writing one took is kept with it, so that a training by time can count it (``userllm.training.budget``) wherever
the summary comes from: else a second run of the same cell would see more examples.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from userllm.clock import clock_of
from userllm.data.sources.fetch import cache_folder
from userllm.errors import UserError
from userllm.language_models.end_tokens import end_tokens
from userllm.language_models.pretrained import LanguageModelConfig, load, resolve


class Summarizer:
    """Summaries of texts, greedy, at most ``new_tokens`` long.

    The instruction stands behind the text, in the model's chat template where it has one. file: an SQLite database; in
    userllm's cache by default. The model is loaded when the first summary is missing.
    """

    def __init__(
        self,
        lm: LanguageModelConfig,
        instruction: str,
        new_tokens: int,
        batch: int = 16,
        file: Path | None = None,
    ):
        self.lm, self.instruction, self.new_tokens, self.batch = lm, instruction, new_tokens, batch
        self.file = file or cache_folder() / "summaries.sqlite"
        self.sha256 = resolve(lm).sha256
        self.written = 0
        """Summaries this object has had to write."""
        self.spared = 0.0
        """Seconds that writing those took that this object was spared, since they were on disk (``clock_of``)."""
        self._paid: set[str] = set()
        self._loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase, GenerationConfig] | None = None

    def __call__(self, texts: Sequence[str]) -> list[str]:
        """One summary per text, on one line; each is on disk before the next batch is begun."""
        keys = [self._key(text) for text in texts]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(self.file, timeout=60)) as database:
            database.execute(
                "CREATE TABLE IF NOT EXISTS timed_summaries "
                "(key TEXT PRIMARY KEY, text TEXT, summary TEXT, seconds REAL)"
            )
            found = {key: self._find(database, key) for key in keys}
            known = {key: one[0] for key, one in found.items() if one is not None}
            self.spared += sum(
                one[1] for key, one in found.items() if one is not None and key not in self._paid
            )
            self._paid |= found.keys()
            missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
            order = sorted(missing, key=lambda key: len(missing[key]))  # alike lengths together
            for start in range(0, len(order), self.batch):
                part = order[start : start + self.batch]
                summaries, seconds = self._write([missing[key] for key in part])
                known |= dict(zip(part, summaries, strict=True))
                rows = [(key, missing[key], known[key], seconds / len(part)) for key in part]
                with database:
                    database.executemany("INSERT OR REPLACE INTO timed_summaries VALUES (?, ?, ?, ?)", rows)
        return [known[key] for key in keys]

    def described(self) -> dict[str, Any]:
        """Who summarises, how, and how many summaries had to be written, for metrics.json."""
        return {
            "lm": self.lm.name,
            "sha256": self.sha256,
            "instruction": self.instruction,
            "new_tokens": self.new_tokens,
            "decoding": "greedy",
            "written": self.written,
        }

    def _find(self, database: sqlite3.Connection, key: str) -> tuple[str, float] | None:
        found: tuple[str, float] | None = database.execute(
            "SELECT summary, seconds FROM timed_summaries WHERE key = ?", (key,)
        ).fetchone()
        return found

    def _key(self, text: str) -> str:
        told = [self.sha256, self.lm.dtype, self.instruction, self.new_tokens, text]
        if self.lm.products != "float32":
            told.append(self.lm.products)
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def _load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, GenerationConfig]:
        lm, tokenizer, _ = load(self.lm)
        chat = tokenizer.chat_template is not None
        settings = GenerationConfig(
            max_new_tokens=self.new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=end_tokens(lm, tokenizer) if chat else tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            decoder_start_token_id=_decoder_start(lm),
        )
        lm.generation_config = GenerationConfig()  # what the settings leave open is not the LM's to say
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return lm.to(device or "cpu"), tokenizer, settings  # type: ignore[arg-type]

    @torch.no_grad()
    def _write(self, texts: Sequence[str]) -> tuple[list[str], float]:
        """The summaries, and the seconds they took."""
        lm, tokenizer, settings = self._loaded = self._loaded or self._load()
        clock = clock_of(lm.device)
        began = clock()
        inputs = tokenizer(
            [self._prompt(tokenizer, text) for text in texts],
            add_special_tokens=tokenizer.chat_template is None,  # a chat template writes its own
            padding=True,
            padding_side="left",
            return_tensors="pt",
            return_token_type_ids=False,
        ).to(lm.device)
        output = lm.generate(**inputs, generation_config=settings)  # type: ignore[operator]
        # a decoder that has an encoder to read from does not repeat what was read
        new = output if lm.config.is_encoder_decoder else output[:, inputs["input_ids"].shape[1] :]
        self.written += len(texts)
        said = tokenizer.batch_decode(new, skip_special_tokens=True)
        return [" ".join(one.split()) for one in said], clock() - began

    def _prompt(self, tokenizer: PreTrainedTokenizerBase, text: str) -> str:
        asked = f"{text}{self.instruction}"
        if tokenizer.chat_template is None:
            return f"{asked}\n"
        message = [{"role": "user", "content": asked}]
        return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))


def _decoder_start(lm: PreTrainedModel) -> int | None:
    """The token that the decoder of an encoder-decoder LM begins with; None for a causal one."""
    if not lm.config.is_encoder_decoder:
        return None
    for config in (lm.config, lm.generation_config):
        if (start := getattr(config, "decoder_start_token_id", None)) is not None:
            return int(start)
    raise UserError(f"{type(lm).__name__}: its configuration names no decoder_start_token_id")
