"""Texts of published reviews, cleaned of what the web put into them."""

from __future__ import annotations

import html
import re

import polars as pl

from userllm.data.sources.reviews_config import Translated

ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
LINE_BREAK = r"(?i)<br\s*/?>"
TRANSLATION_FIRST = r"(?s)^\s*\(Translated by Google\)\s*(.*?)\s*\(Original\)\s*(.*)$"
ORIGINAL_FIRST = r"(?s)^\s*(\S.*?)\s*\(Translated by Google\)\s*(.*)$"


def plain(texts: pl.Series) -> pl.Series:
    """Texts without HTML entities, with line breaks for <br />, stripped; "" where there is none.

    Only what is a whole entity, its semicolon included, counts as one ("AT&T" stays).

    >>> plain(pl.Series(["Tom &amp; Jerry&#39;s<br /> AT&T ", None])).to_list()
    ["Tom & Jerry's\\n AT&T", '']
    """
    texts = texts.fill_null("")
    if texts.str.contains(LINE_BREAK).any():
        texts = texts.str.replace_all(LINE_BREAK, "\n")
    if (coded := texts.str.contains("&", literal=True)).any():
        decoded = [plain_text(text) for text in texts.filter(coded).to_list()]
        texts = texts.clone().scatter(coded.arg_true(), pl.Series(decoded, dtype=pl.String))
    return texts.str.strip_chars()


def plain_text(text: str) -> str:
    """One text without HTML entities."""
    return ENTITY.sub(lambda found: html.unescape(found[0]), text)


def one_side(texts: pl.Series, side: Translated) -> tuple[pl.Series, int]:
    """Of texts that Google translated the asked side, and how many such texts there are; others stay.

    Google writes "(Translated by Google) ... (Original) ...", and sometimes the original, then "(Translated by Google)
    ...". A translation without its original stays as it is.

    >>> one_side(pl.Series(["(Translated by Google) Good\\n\\n(Original)\\nBueno", "Fine"]), "original")[0].to_list()
    ['Bueno', 'Fine']
    """
    marked = texts.str.contains("(Translated by Google)", literal=True)
    if not marked.any():
        return texts, 0
    found = texts.filter(marked).to_frame("text").with_columns(
        front=pl.col("text").str.extract_groups(TRANSLATION_FIRST),
        back=pl.col("text").str.extract_groups(ORIGINAL_FIRST),
    )  # fmt: skip
    translation = pl.coalesce(pl.col("front").struct["1"], pl.col("back").struct["2"])
    original = pl.coalesce(pl.col("front").struct["2"], pl.col("back").struct["1"])
    sides = found.select("text", translation=translation, original=original)
    count = len(sides) - sides["original"].null_count()
    if side == "both":
        return texts, count
    kept = sides.select(pl.coalesce(side, "text").str.strip_chars()).to_series()
    return texts.clone().scatter(marked.arg_true(), kept), count
