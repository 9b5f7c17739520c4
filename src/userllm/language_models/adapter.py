"""LoRA on the language model. The only file that knows peft."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch.nn import Parameter
from transformers import PreTrainedModel

from userllm.ranges import PositiveInt


@dataclass
class LoraConfig:
    """Low-rank adapters on the LM's linear layers."""

    rank: PositiveInt = 8
    """Rank (paper: 8)."""
    alpha: PositiveInt = 16
    """Scaling numerator (ours: the paper is silent)."""
    targets: str = "all-linear"
    """Modules that get an adapter, as peft names them (ours)."""


class Adapter:
    """A LoRA adapter living inside ``lm``, whose layers it changes in place. Add it before fusing the LM."""

    def __init__(self, peft_model: PeftModel):
        self._peft_model = peft_model

    @classmethod
    def add(cls, lm: PreTrainedModel, config: LoraConfig) -> Adapter:
        """A fresh adapter: it changes nothing until it is trained."""
        kind = "SEQ_2_SEQ_LM" if lm.config.is_encoder_decoder else "CAUSAL_LM"
        settings = PeftLoraConfig(
            r=config.rank, lora_alpha=config.alpha, target_modules=config.targets, task_type=kind
        )
        return cls(get_peft_model(lm, settings))  # type: ignore[arg-type]

    @classmethod
    def load(cls, lm: PreTrainedModel, folder: Path) -> Adapter:
        """The adapter saved in ``folder`` (a plain peft folder)."""
        return cls(PeftModel.from_pretrained(lm, folder, is_trainable=True))

    def save(self, folder: Path) -> None:
        """Write a plain peft folder. The LM must be detached from its cross-attention blocks."""
        self._peft_model.save_pretrained(str(folder))

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The LM is what it was before the adapter, for the length of a ``with`` block."""
        with self._peft_model.disable_adapter():
            yield

    def parameters(self) -> Iterator[Parameter]:
        """The adapter's weights."""
        return (p for name, p in self._peft_model.named_parameters() if "lora_" in name)
