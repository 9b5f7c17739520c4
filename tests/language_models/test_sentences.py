"""Sentence encoders of two families, against a loop over single texts and against sentence-transformers."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel, T5Config, T5EncoderModel

from userllm.errors import UserError
from userllm.language_models.sentences import find_sentence_encoder
from userllm.language_models.tiny import tiny_tokenizer

TEXTS = [
    "Heat (1995)",
    "",
    "The movie Heat (1995) is listed with genres Action, Crime",
    "5",
    "Ünïcödé " * 30,
    "heat",
]


def write_encoder(folder, family="bert", pooling="mean", normalize=True, dense=False, lower=False, limit=24):
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "right"
    if family == "bert":
        sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "hidden_size": 32}
        model = BertModel(BertConfig(vocab_size=len(tokenizer), initializer_range=0.3, **sizes))
    else:
        sizes = {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 64, "num_layers": 2, "dropout_rate": 0.0}
        model = T5EncoderModel(T5Config(vocab_size=len(tokenizer), initializer_factor=2.0, **sizes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    old = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens"}
    flags = {f"pooling_mode_{name}": kind == pooling for kind, name in old.items()}
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **flags}))
    if dense:
        (folder / "2_Dense").mkdir()
        layer = {
            "in_features": 32,
            "out_features": 12,
            "bias": False,
            "activation_function": "torch.nn.modules.activation.Tanh",
        }
        (folder / "2_Dense" / "config.json").write_text(json.dumps(layer))
        save_file({"linear.weight": torch.randn(12, 32)}, folder / "2_Dense" / "model.safetensors")
        modules.append(("2_Dense", "Dense"))
    if normalize:
        modules.append((f"{len(modules)}_Normalize", "Normalize"))
    listed = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (path, kind) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "sentence_bert_config.json").write_text(
        json.dumps({"max_seq_length": limit, "do_lower_case": lower})
    )
    return folder


@pytest.fixture(
    params=[
        {},
        {"pooling": "cls", "normalize": False},
        {"pooling": "max", "lower": True},
        {"family": "t5", "dense": True},
    ],
    ids=["bert mean", "bert cls", "bert max", "t5 dense"],
)
def folder(request, tmp_path):
    (tmp_path / "encoder").mkdir()
    return write_encoder(tmp_path / "encoder", **request.param)


def test_many_at_once_are_each_alone(folder):
    encoder = find_sentence_encoder(str(folder)).load()
    together = encoder.encode(TEXTS, tokens=40)
    assert together.dtype == np.float32 and together.shape == (len(TEXTS), encoder.width)
    for text, vector in zip(TEXTS, together, strict=True):
        np.testing.assert_allclose(encoder.encode([text])[0], vector, atol=1e-5)
    assert encoder.encode([]).shape == (0, encoder.width)


@pytest.mark.filterwarnings("ignore")
def test_the_numbers_of_sentence_transformers(folder):
    library = pytest.importorskip("sentence_transformers")
    theirs = library.SentenceTransformer(str(folder), device="cpu").encode(TEXTS[:1] + TEXTS[2:])
    ours = find_sentence_encoder(str(folder)).load().encode(TEXTS[:1] + TEXTS[2:])
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_by_hand(tmp_path):
    """Mean over the tokens of the last states, through the dense layer, to length 1."""
    folder = write_encoder(tmp_path, family="t5", dense=True)
    model, tokenizer = T5EncoderModel.from_pretrained(folder).eval(), tiny_tokenizer()
    from safetensors.torch import load_file

    weight = load_file(folder / "2_Dense" / "model.safetensors")["linear.weight"]
    encoder = find_sentence_encoder(str(folder)).load()
    for text in TEXTS[2:]:
        ids = torch.tensor([tokenizer(text)["input_ids"][:24]])
        with torch.no_grad():
            mean = model(input_ids=ids).last_hidden_state[0].mean(0)
        vector = torch.tanh(weight @ mean)
        np.testing.assert_allclose(encoder.encode([text])[0], vector / vector.norm(), atol=1e-5)


def test_the_hash_tells_encoders_apart(tmp_path):
    cards = []
    for n, settings in enumerate(
        [{}, {}, {"pooling": "cls"}, {"normalize": False}, {"limit": 12}, {"family": "t5"}]
    ):
        (tmp_path / str(n)).mkdir()
        cards.append(find_sentence_encoder(str(write_encoder(tmp_path / str(n), **settings))).card.sha256)
    assert cards[0] == cards[1] and len(set(cards)) == 5


def test_what_is_not_known_is_refused(tmp_path):
    folder = write_encoder(tmp_path)
    modules = json.loads((folder / "modules.json").read_text())
    modules[2]["type"] = "sentence_transformers.models.LSTM"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError, match="module LSTM is not known"):
        find_sentence_encoder(str(folder))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "weightedmean"}))
    with pytest.raises(UserError, match="pooling weightedmean; known are cls, mean, max"):
        find_sentence_encoder(str(folder))
    with pytest.raises(UserError, match=r"no such folder.*all-minilm-l6-v2"):
        find_sentence_encoder(str(tmp_path / "gone"))
