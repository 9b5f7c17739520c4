import pytest

from userllm.errors import UserError
from userllm.language_models.adapter import Adapter, LoraConfig
from userllm.language_models.tiny import tiny_language_model


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r".*(q_proj|v_proj)"])
def test_targets_are_a_list_of_names_or_an_expression(targets):
    lm, _ = tiny_language_model("llama")
    Adapter.add(lm, LoraConfig(rank=2, targets=targets))
    assert {name.split(".")[-4] for name, _ in lm.named_parameters() if "lora_A" in name} == {
        "q_proj",
        "v_proj",
    }


@pytest.mark.parametrize("targets", ["q_proj", "q_proj,v_proj", "(", ".*norm", ["query"], ""])
def test_targets_that_are_not_there_are_named(targets):
    lm, _ = tiny_language_model("llama")
    with pytest.raises(UserError, match=r"lora\.targets .*; give a list of modules' names"):
        Adapter.add(lm, LoraConfig(rank=2, targets=targets))


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], r".*(q_proj|lm_head)"])
def test_the_output_layer_has_no_adapter(targets):
    """Answers are scored by its weights, where an adapter would not be seen."""
    lm, _ = tiny_language_model("llama")
    with pytest.raises(UserError, match=r"lora\.targets .* output layer .* cannot have an adapter"):
        Adapter.add(lm, LoraConfig(rank=2, targets=targets))
