"""The trie against a dictionary of prefixes, for random sets of token sequences."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from userllm.data.titles import distinct_titles
from userllm.decoding.prefix_tree import PrefixTree, segment_log_softmax
from userllm.errors import UserError
from userllm.language_models.tiny import ARCHITECTURES
from userllm.language_models.word_start import lead

END = 9


def marking_tokenizer(texts):
    """As Llama 2's: a text begins with the mark of a word, whether or not a space stands there."""
    words = sorted({f"▁{word}" for text in texts for word in text.split()})
    letters = sorted({letter for word in words for letter in word} | set("xy"))
    vocabulary = {token: n for n, token in enumerate(["<unk>", "</s>", *letters])}
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


answer_sets = st.lists(
    st.lists(st.integers(0, 4), max_size=5).map(lambda tokens: (*tokens, END)),
    min_size=1,
    max_size=25,
    unique=True,
)


def prefixes(answers):
    """By prefix: the answers that begin with it."""
    found = {}
    for number, tokens in enumerate(answers):
        for length in range(len(tokens) + 1):
            found.setdefault(tuple(tokens[:length]), []).append(number)
    return found


def prefix_of(tree, node):
    tokens = []
    while node > 0:
        tokens.append(int(tree.token[node]))
        node = int(tree.parent[node])
    return tuple(reversed(tokens))


@given(answer_sets)
def test_nodes_are_the_prefixes_and_ranges_their_answers(answers):
    tree, expected = PrefixTree.from_tokens(answers), prefixes(answers)
    spelled = [prefix_of(tree, node) for node in range(len(tree.token))]
    assert sorted(spelled) == sorted(expected)
    for node, prefix in enumerate(spelled):
        below = tree.order[tree.low[node] : tree.high[node]].tolist()
        assert sorted(below) == expected[prefix]
        assert tree.depth[node] == len(prefix)
        assert bool(tree.is_single(torch.tensor([node]))) == (len(below) == 1)
    assert tree.order[tree.leaf_rank].tolist() == list(range(len(answers)))


@given(answer_sets)
def test_children_are_adjacent_and_partition_their_parents_answers(answers):
    tree = PrefixTree.from_tokens(answers)
    for node in range(len(tree.token)):
        start, count = int(tree.child_start[node]), int(tree.child_count[node])
        children = range(start, start + count)
        assert [c for c in range(len(tree.token)) if tree.parent[c] == node] == list(children)
        if count:
            assert tree.low[start] == tree.low[node]
            assert tree.high[start + count - 1] == tree.high[node]
            assert all(tree.high[a] == tree.low[b] for a, b in pairwise(children))
        else:
            assert tree.token[node] == END


@given(answer_sets)
def test_every_answer_is_reachable_along_its_path(answers):
    tree = PrefixTree.from_tokens(answers)
    assert len(tree) == len(answers)
    for number, tokens in enumerate(answers):
        path = [n for n in tree.paths[number].tolist() if n >= 0]
        assert path[0] == 0
        assert tree.paths[number].tolist()[len(path) :] == [-1] * (tree.paths.shape[1] - len(path))
        assert tuple(tree.token[path[1:]].tolist()) == tokens
        assert tree.order[tree.low[path[-1]]] == number
        assert tree.vocabulary[tree.column[path[1:]]].tolist() == list(tokens)


@given(answer_sets, st.data())
def test_flat_children_of_several_nodes(answers, data):
    tree = PrefixTree.from_tokens(answers)
    nodes = data.draw(st.lists(st.integers(-1, len(tree.token) - 1), min_size=1, max_size=6))
    rows, children = tree.children(torch.tensor(nodes))
    expected = [
        (row, child)
        for row, node in enumerate(nodes)
        for child in range(len(tree.token))
        if node >= 0 and child and tree.parent[child] == node
    ]
    assert list(zip(rows.tolist(), children.tolist(), strict=True)) == expected


@given(st.lists(st.lists(st.integers(0, 2), max_size=3), min_size=2, max_size=8))
def test_an_answer_that_begins_another_is_refused(answers):
    clash = any(i != j and b[: len(a)] == a for i, a in enumerate(answers) for j, b in enumerate(answers))
    if clash:
        with pytest.raises(UserError, match="read alike"):
            PrefixTree.from_tokens(answers)
    else:
        assert len(PrefixTree.from_tokens(answers)) == len(answers)


def test_an_empty_catalogue_is_refused(tiny_lm):
    _, tokenizer = tiny_lm("llama")
    for build in (lambda: PrefixTree.from_tokens([]), lambda: PrefixTree.from_texts([], tokenizer)):
        with pytest.raises(UserError, match="catalogue of answers is empty"):
            build()


def test_titles_alike_and_titles_within_titles(tiny_lm, catalogue):
    _, tokenizer = tiny_lm("llama")
    with pytest.raises(
        UserError, match=r"'The Mask \(1994\)' and 'The Mask \(1994\)' read alike .* rename one"
    ):
        PrefixTree.from_texts(catalogue["title"].to_list(), tokenizer)
    texts = distinct_titles(catalogue["title"].to_list())
    tree = PrefixTree.from_texts(texts, tokenizer)
    for number, text in enumerate(texts):
        path = [n for n in tree.paths[number].tolist() if n > 0]
        assert tokenizer.decode(tree.token[path]) == f" {text}{tokenizer.eos_token}"
    mask, longer = texts.index("The Mask"), texts.index("The Mask (1994)")
    shared = set(tree.paths[mask].tolist()) & set(tree.paths[longer].tolist()) - {-1}
    inner = max(shared, key=lambda n: int(tree.depth[n]))
    _, children = tree.children(torch.tensor([inner]))
    assert tokenizer.eos_token_id in tree.token[children].tolist()


def test_answers_begin_as_words_behind_the_prompt(tiny_lm):
    marking = marking_tokenizer(["Toy Story", "Heat", "namely"])
    assert lead(marking) == ""
    tree = PrefixTree.from_texts(["Toy Story", "Heat"], marking, lead(marking))
    for number, text in enumerate(["Toy Story", "Heat"]):
        path = [n for n in tree.paths[number].tolist() if n > 0]
        spelled = marking.convert_ids_to_tokens(tree.token[path].tolist())
        assert ["▁namely", *spelled] == [*marking.tokenize(f"namely {text}"), "</s>"]
    for architecture in ARCHITECTURES:
        assert lead(tiny_lm(architecture)[1]) == " "


def test_a_tokenizer_must_be_able_to_end_a_text(tiny_lm):
    _, tokenizer = tiny_lm("llama")
    endless = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>")
    with pytest.raises(UserError, match="no end-of-text token"):
        PrefixTree.from_texts(["Heat"], endless)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_segments_are_softmaxed_apart(sizes):
    rows = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    values = torch.randn(len(rows), dtype=torch.double) * 50
    expected = torch.cat([torch.log_softmax(part, 0) for part in values.split(sizes)])
    torch.testing.assert_close(segment_log_softmax(values, rows, len(sizes)), expected)
