"""Measures of written texts: rouge-score's numbers in English, and words of other scripts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from userllm.evaluation.text_metrics import distinct, length, rouge

ENGLISH = [
    ("I don't like it; 10/10 for the fit_and-flare!", "I do like the fit. It's 10 of 10"),
    ("Runs   small\n\nSIZE up.", "runs large, size down"),
    ("Great dress", "Great dress"),
    ("...", "Great dress"),
]


def test_distinct_and_length():
    texts = ["It fits. It fits!", "", "I'm happy"]
    assert length(texts, texts)["words"].tolist() == [4, 0, 2]
    assert distinct(texts, texts) == {"distinct_1": 4 / 6, "distinct_2": 3 / 4}
    assert distinct([], [""]) == {"distinct_1": 0.0, "distinct_2": 0.0}


def test_rouge_lsum_compares_sentences():
    target, text = ["It fits well. I loved the dress!"], ["I loved the dress! It fits well."]
    assert rouge(target, text)["rougeLsum"][0] == 1.0
    assert RougeScorer(["rougeL"]).score(target[0], text[0])["rougeL"].fmeasure < 1.0
    assert rouge(target, [""])["rouge1"][0] == 0.0


@pytest.mark.parametrize("name", ["rouge1", "rouge2"])
@given(st.text(st.characters(min_codepoint=9, max_codepoint=126)))
def test_english_has_the_words_of_rouge_score(name, text):
    expected = RougeScorer([name]).score("It's 10/10_fit\tof ALL", text)[name].fmeasure
    assert rouge(["It's 10/10_fit\tof ALL"], [text])[name][0] == expected


def test_english_texts_of_several_words():
    expected = [RougeScorer(["rouge1"]).score(*pair)["rouge1"].fmeasure for pair in ENGLISH]
    assert rouge(*zip(*ENGLISH, strict=True))["rouge1"].tolist() == expected
    assert np.ptp(expected) > 0


@pytest.mark.parametrize(
    ("target", "text", "shared", "words"),
    [
        ("Очень красивое платье", "красивое платье", 4 / 5, 2),
        ("très élégant", "tres élégant", 1 / 2, 2),
        ("服はとても良い", "服は良い", 8 / 11, 4),  # written without spaces: character by character
        ("옷이 예뻐요", "옷이 커요", 1 / 2, 2),
        ("यह पोशाक सुंदर है", "पोशाक सुंदर", 4 / 6, 2),  # vowel signs belong to their letters
        ("ชุดสวย", "ชุดดี", 4 / 8, 3),
        ("ثوب جميل", "ثوب طويل", 1 / 2, 2),
    ],
)
def test_words_of_other_scripts(target, text, shared, words):
    assert rouge([target], [text])["rouge1"][0] == pytest.approx(shared)
    assert length([target], [text])["words"][0] == words
    assert distinct([], [text])["distinct_1"] == 1.0
