"""Which language models have a last position."""

import pytest
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from userllm.language_models.positions import position_limit

SMALL = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}
LMS = {
    "gpt2": (SMALL, 40),
    "gptj": (SMALL | {"rotary_dim": 8}, 40),
    "codegen": (SMALL | {"rotary_dim": 8}, 40),
    "llama": (
        {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 40},
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LMS)
def test_a_table_of_positions_is_a_limit(name):
    sizes, limit = LMS[name]
    assert position_limit(AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**sizes))) == limit
