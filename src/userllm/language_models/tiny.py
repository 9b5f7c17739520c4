"""Tiny language models with random weights, one per supported architecture: for tests and smoke runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from userllm.errors import UserError

_LAYERS, _WIDTH, _HEADS, _POSITIONS = 4, 32, 4, 1024
_GROUPED = {"num_key_value_heads": 2, "head_dim": _WIDTH // _HEADS, "intermediate_size": 64}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GROUPED),
    "qwen3": ("qwen3", _GROUPED),
    # Sliding-window layers beside full ones, as in the real model.
    "gemma3": (
        "gemma3_text",
        _GROUPED
        | {"sliding_window": 16, "query_pre_attn_scalar": 8}
        | {"layer_types": ["sliding_attention", "full_attention"] * (_LAYERS // 2)},
    ),
    "gpt2": ("gpt2", {"n_embd": _WIDTH, "n_layer": _LAYERS, "n_head": _HEADS, "n_positions": _POSITIONS}),
    "opt": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": _WIDTH}),
    "gpt_neox": ("gpt_neox", {"intermediate_size": 64}),
    "phi3": ("phi3", {"num_key_value_heads": 2, "intermediate_size": 64}),
    # Encoder and decoder; a head of its own and gated feed-forward layers, as FLAN-T5 has.
    "t5": (
        "t5",
        {"d_model": _WIDTH, "d_kv": _WIDTH // _HEADS, "num_heads": _HEADS, "num_layers": _LAYERS, "d_ff": 64}
        | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0}
        | {"initializer_factor": 2.0, "dropout_rate": 0.1},
    ),
}
"""Short name -> (transformers' model type, the settings it needs beside the shared ones)."""

SAMPLE_TEXTS = (
    "The user has watched these movies, latest last: Toy Story (1995), Heat (1995), GoldenEye (1995).",
    "What will the user watch next? Star Wars: Episode IV - A New Hope (1977)",
    "What is the user's favorite genre? Action, Adventure, Animation, Children's, Comedy, Crime, Documentary, Drama, "
    "Fantasy, Film-Noir, Horror, Musical, Mystery, Romance, Sci-Fi, Thriller, War, Western",
)
"""What a tokenizer learns its merges from when no other texts are given."""


def tiny_language_model(
    architecture: str, vocab_texts: Iterable[str] = SAMPLE_TEXTS, seed: int = 0
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """An LM of 4 layers of width 32 with random weights, and a byte-level BPE tokenizer trained on the texts.

    The same arguments give the same weights. Their scale is ten times the usual one, so that outputs differ visibly.
    Raises UserError for an unknown architecture.
    """
    tokenizer = tiny_tokenizer(vocab_texts)
    config = _config(architecture, tokenizer)
    if config.is_encoder_decoder:  # T5's tokenizer ends every text
        end = [("<eos>", tokenizer.eos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=end)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = kind.from_config(config, dtype=torch.float32)
        if config.is_encoder_decoder:
            model.lm_head.weight = torch.nn.Parameter(torch.randn(len(tokenizer), _WIDTH) * _WIDTH**-0.5)
    model.eval()
    return model, tokenizer


def tiny_tokenizer(vocab_texts: Iterable[str] = SAMPLE_TEXTS, size: int = 512) -> PreTrainedTokenizerFast:
    """Byte-level BPE with at most ``size`` tokens, of which <pad>, <bos> and <eos> are 0, 1 and 2.

    Encodes any text without loss and prepends nothing.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(vocab_texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=_POSITIONS,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def _config(architecture: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"tiny-random-{architecture}: unknown architecture; known are {', '.join(ARCHITECTURES)}"
        )
    model_type, own = ARCHITECTURES[architecture]
    config_class: Any = CONFIG_MAPPING[model_type]
    shared = {
        "hidden_size": _WIDTH,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "max_position_embeddings": _POSITIONS,
    }
    if model_type in ("gpt2", "t5"):  # spell the shared settings their own way
        shared = {}
    scale = {"init_std": 0.2} if model_type == "opt" else {"initializer_range": 0.2}
    if model_type == "t5":
        scale = {}
    return config_class(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **shared,
        **own,
        **scale,
    )
