"""How long a text a language model can read at all."""

from __future__ import annotations

from torch import nn


def position_limit(lm: nn.Module) -> int | None:
    """Tokens for which an LM that looks positions up in a table (GPT-2, OPT; GPT-J, whose table is computed) has a row;
    None for one that has no table.

    Rotary and relative positions go on past what the LM was trained on: worse, but without an error.
    """
    limit = getattr(lm.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[operator, union-attr]
    words = lm.get_input_embeddings()  # type: ignore[operator]
    tables = [one.weight for one in lm.modules() if isinstance(one, nn.Embedding) and one is not words]
    tables += [one for one in lm.buffers() if one.ndim == 2]
    # OPT has two rows more than positions
    return limit if limit and any(len(one) in (limit, limit + 2) for one in tables) else None
