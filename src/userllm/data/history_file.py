"""A user's history as a JSON file: what a program that knows its own users can write.

    [{"item": "Heat (1995)", "rating": 5, "time": 978300760}, {"item": "Toy Story (1995)"}]

``item`` is a raw id of the catalogue or a title that only one item has; everything else is optional.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from userllm.data.sources.values import LEAST, MOST
from userllm.errors import UserError
from userllm.events import Event, UserHistory


def read_history(file: Path | str, fields: Sequence[str] = ("rating",)) -> UserHistory:
    """The history in a JSON file, oldest event first.

    fields: see ``parse_history``. Raises UserError naming file and event for anything else.
    """
    file = Path(file)
    if not file.is_file():
        raise UserError(f"{file}: no such history file")
    try:
        raw = json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{file} line {error.lineno}: not JSON ({error.msg})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error.reason})") from error
    except (ValueError, RecursionError) as error:  # digits without end, lists within lists
        raise UserError(f"{file}: cannot be read ({error})") from error
    return parse_history(raw, str(file), fields)


def parse_history(raw: Any, where: str, fields: Sequence[str] = ("rating",)) -> UserHistory:
    """The history that a JSON value tells, oldest event first. where: for messages.

    fields: names that an event may have besides ``item`` and ``time``. Where every event has a time (seconds since
    1970) the events are sorted by it, ties in the order given; where none has, that order counts (ours). An empty list
    is a user of whom nothing is known. Raises UserError naming the event for anything else.
    """
    if not isinstance(raw, list):
        raise UserError(f'{where}: a history is a JSON list of events such as [{{"item": "Heat (1995)"}}]')
    try:
        json.dumps(raw, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: holds half a character ({error.reason})") from error
    events = [_event(entry, f"{where} event {number}", fields) for number, entry in enumerate(raw, 1)]
    times = [event.time for event in events if event.time is not None]
    if times and len(times) < len(events):
        missing = next(number for number, event in enumerate(events, 1) if event.time is None)
        raise UserError(f"{where} event {missing}: time is missing; give it for every event or for none")
    return UserHistory(sorted(events, key=lambda event: event.time or 0) if times else events)


def _event(entry: Any, where: str, fields: Sequence[str]) -> Event:
    if not isinstance(entry, dict):
        raise UserError(
            f'{where}: expected an object such as {{"item": "Heat (1995)"}}, got {json.dumps(entry)[:40]}'
        )
    if unknown := [name for name in entry if name not in ("item", "time", *fields)]:
        known = ", ".join(["item", "time", *fields])
        raise UserError(f"{where}: unknown field {unknown[0]!r}; an event may have {known}")
    item = entry.get("item")
    if isinstance(item, bool) or not isinstance(item, str | int) or item == "":
        raise UserError(f"{where}: item is {json.dumps(item)}, not an id or title")
    time = entry.get("time")
    if time is not None and (
        isinstance(time, bool) or not isinstance(time, int) or not LEAST <= time <= MOST
    ):
        raise UserError(
            f"{where}: time is {json.dumps(time)}, not whole seconds since 1970, in the years 1 to 9999"
        )
    values = {name: entry[name] for name in fields if entry.get(name) is not None}
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise UserError(f"{where}: {name} is {json.dumps(value)[:40]}, not a number or text")
    return Event(str(item), time, values)
