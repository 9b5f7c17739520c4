"""What is measured of written texts, one function per kind of measure; see ``evaluation.open.TextMetric``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import regex
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

_SENTENCE_END = regex.compile(r"(?<=[.!?])\s+|(?<=[。！？।])\s*")
_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
_CHARACTER = rf"(?:(?=\p{{L}}){_UNSPACED}\p{{M}}*)"
"""A letter of a script without spaces between words; its digits are written in runs, as everywhere."""


def _word(also: str = "") -> regex.Pattern[str]:
    """A word: such a letter, or a run of others, of digits and of what belongs to a word ``also``."""
    return regex.compile(rf"{_CHARACTER}|(?:(?!{_CHARACTER})[\p{{L}}\p{{N}}\p{{M}}{also}])+")


_ROUGE_WORD, _WORD = _word(), _word(also="'")


class _Words(Tokenizer):
    """rouge-score's own words in English text; its tokenizer knows a to z and 0 to 9 only, so that elsewhere nothing
    would be left. Scripts that put no spaces between words are compared character by character."""

    def tokenize(self, text: str) -> list[str]:
        return _ROUGE_WORD.findall(text.lower())


def rouge(targets: Sequence[str], texts: Sequence[str]) -> dict[str, np.ndarray]:
    """ROUGE-1, ROUGE-2 and ROUGE-Lsum (F-measures, Lin 2004) of each text against its target, by rouge-score.

    Without stemming (the package's default; the paper does not say). ROUGE-Lsum compares sentence by sentence; a
    sentence ends at ".", "!" or "?" before white space, at their like in Chinese, Japanese and Hindi, and at a line's
    end (ours). Words of all scripts count (ours; see ``_Words``).
    """
    names = ["rouge1", "rouge2", "rougeLsum"]
    scorer = RougeScorer(names, tokenizer=_Words())
    scores = [scorer.score(_lines(a), _lines(b)) for a, b in zip(targets, texts, strict=True)]
    return {name: np.array([score[name].fmeasure for score in scores]) for name in names}


def length(targets: Sequence[str], texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Words of each text."""
    return {"words": np.array([len(_words(text)) for text in texts], dtype=float)}


def distinct(targets: Sequence[str], texts: Sequence[str]) -> dict[str, float]:
    """Distinct-1 and distinct-2 (Li et al. 2016): different n-grams of all texts together, by how many there are.

    They fall with the number and the length of texts, so only sets of the same prompts can be compared.
    """
    said: dict[str, float] = {}
    for n in (1, 2):
        grams = [
            tuple(words[i : i + n])
            for words in map(_words, texts)
            for i in range(len(words) - n + 1)
        ]  # fmt: skip
        said[f"distinct_{n}"] = len(set(grams)) / len(grams) if grams else 0.0
    return said


def _lines(text: str) -> str:
    return _SENTENCE_END.sub("\n", text)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
