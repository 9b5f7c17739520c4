"""Names for the items of a catalogue: titles, some of which several items have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def distinct_titles(titles: Sequence[str]) -> list[str]:
    """Titles made distinct: the second item of a title becomes ``"title [2]"``, and so on, in catalogue order."""
    used, seen, result = set(titles), Counter[str](), []
    for title in titles:
        seen[title] += 1
        text, number = title, seen[title]
        while number > 1 and (text := f"{title} [{number}]") in used:
            number += 1
        used.add(text)
        result.append(text)
    return result


def listed(names: Sequence[str]) -> str:
    """The first five names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
