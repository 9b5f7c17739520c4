import html

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from userllm.data.sources.review_texts import one_side, plain, plain_text


def test_entities_and_line_breaks():
    given_texts = pl.Series(
        ["Tom &amp; Jerry&#39;s<br /> AT&T ", None, "a<BR>b&nbsp;c &lt;br&gt; &copy &bogus; &amp;amp;"]
    )
    before = given_texts.to_list()
    assert plain(given_texts).to_list() == ["Tom & Jerry's\n AT&T", "", "a\nb\xa0c <br> &copy &bogus; &amp;"]
    assert given_texts.to_list() == before


@given(st.text())
def test_escaping_is_undone(text):
    assert plain_text(html.escape(text)) == text


@pytest.mark.parametrize(
    ("text", "translation", "original"),
    [
        ("(Translated by Google) Good\n\n(Original)\nBueno", "Good", "Bueno"),
        ("Bueno\n\n(Translated by Google)\nGood", "Good", "Bueno"),
        ("(Translated by Google) One\n\ntwo\n\n(Original)\nUno\n\ndos", "One\n\ntwo", "Uno\n\ndos"),
        ("(Translated by Google) no original", None, None),
        ("plain (Original) text", None, None),
        ("", None, None),
    ],
)
def test_sides_of_a_translation(text, translation, original):
    texts = pl.Series(["before", text, "after"])
    both = one_side(texts, "both")
    assert both[0].to_list() == ["before", text, "after"]
    assert both[1] == (translation is not None)
    assert one_side(texts, "translation")[0].to_list() == ["before", translation or text, "after"]
    assert one_side(texts, "original")[0].to_list() == ["before", original or text, "after"]
