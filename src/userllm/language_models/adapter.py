"""LoRA on the language model. The only file that knows peft."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn import Parameter
from transformers import PreTrainedModel

from userllm.errors import UserError
from userllm.ranges import PositiveInt


@dataclass
class LoraConfig:
    """Low-rank adapters on the LM's linear layers."""

    rank: PositiveInt = 8
    """Rank (paper: 8)."""
    alpha: PositiveInt = 16
    """Scaling numerator (ours: the paper is silent)."""
    targets: list[str] | str = "all-linear"
    """Modules that get an adapter (ours): a list of their names, such as [q_proj, v_proj], a regular expression for
    whole names (".*self_attn.*"), or "all-linear". The output layer cannot have one."""


class Adapter:
    """A LoRA adapter living inside ``lm``, whose layers it changes in place. Add it before fusing the LM."""

    def __init__(self, peft_model: PeftModel):
        self._peft_model = peft_model

    @classmethod
    def add(cls, lm: PreTrainedModel, config: LoraConfig) -> Adapter:
        """A fresh adapter: it changes nothing until it is trained. Raises UserError for targets the LM does not have.

        The LM is of no use after that.
        """
        kind = "SEQ_2_SEQ_LM" if lm.config.is_encoder_decoder else "CAUSAL_LM"
        settings = PeftLoraConfig(
            r=config.rank, lora_alpha=config.alpha, target_modules=config.targets, task_type=kind
        )
        asked = f"strategy.lora.targets {config.targets!r}"
        try:
            adapter = cls(get_peft_model(lm, settings))  # type: ignore[arg-type]
        except (ValueError, re.error) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"{asked}: {reason}; give a list of modules' names ([q_proj, v_proj]), or all-linear; any other text "
                "is a regular expression for whole names"
            ) from error
        if isinstance(lm.get_output_embeddings(), BaseTunerLayer):  # whose weights userllm reads by itself
            raise UserError(
                f"{asked}: the output layer is among them and cannot have an adapter; leave it out"
            )
        return adapter

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
