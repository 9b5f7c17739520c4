"""JSON that userllm wrote itself, read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from userllm.errors import UserError

ANEW = "remove it, and what it told of is done anew"
"""How a damaged record of a run is mended."""
AGAIN = "remove the folder it lies in, and run that stage again"
"""How a damaged part of a stage is mended."""


def read_json(file: Path, mend: str) -> Any:
    """What a JSON file holds. mend: what to do about a damaged one. Raises UserError naming file and line."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); {mend}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{file}, line {error.lineno}: not JSON ({error.msg}); {mend}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error.reason}); {mend}") from error


def read_object(file: Path, mend: str, *keys: str) -> dict[str, Any]:
    """A JSON object that has ``keys``, as ``read_json`` reads it. Raises UserError for any other."""
    found = read_json(file, mend)
    if not isinstance(found, dict):
        raise UserError(f"{file}: a JSON object is expected, not a {type(found).__name__}; {mend}")
    if missing := [key for key in keys if key not in found]:
        raise UserError(f"{file}: {missing[0]!r} is missing; {mend}")
    return found
