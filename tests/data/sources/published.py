"""Small files in exactly the shapes that Amazon's and Google Local's publishers gave them. The content is invented."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Review = tuple[str, str, float | None, int, str, str]
"""User, item, rating, seconds since 1970, summary, text."""

REVIEWS: list[Review] = [
    ("A2SUAM1J3GNN3B", "0000031852", 5.0, 1252800000, "Tom &amp; Jerry", "I like it.<br /><br />Twice &#34;so&#34;. "),
    ("A14VAT5EAX3D9S", "B00004Y2UT", 2.0, 1252800000, "", ""),
    ("A2SUAM1J3GNN3B", "B00004Y2UT", 4.0, 1252713600, "fine", "AT&T, señora"),
    ("A2SUAM1J3GNN3B", "B000068O59", 3.0, 1252800000, "so so", "It does what it says"),
    ("A14VAT5EAX3D9S", "B00004Y2UT", 2.0, 1252800000, "", ""),
]  # fmt: skip
ITEMS: dict[str, tuple[str | None, list[str]]] = {
    "0000031852": (
        "Girls Ballet Tutu\n Zebra &amp; Pink",
        ["Sports &amp; Outdoors", "Other Sports", "Dance"],
    ),
    "B00004Y2UT": (None, ["Musical Instruments", "Strings &amp; Things"]),
    "B0NOREVIEW": ("Never reviewed", ["Musical Instruments"]),
}
REVIEWERS = ("Jane Doe", "B. Buyer")
JUNK = "var aPageStart = (new Date()).getTime();"


def pack(file: Path, lines: Iterable[str]) -> Path:
    raw = "".join(f"{line}\n" for line in lines).encode()
    file.write_bytes(gzip.compress(raw) if file.suffix == ".gz" else raw)
    return file


def review_2014(n: int, review: Review) -> dict[str, Any]:
    user, item, rating, time, summary, text = review
    return {
        "reviewerID": user, "asin": item, "reviewerName": REVIEWERS[n % 2], "helpful": [0, 1], "reviewText": text,
        "overall": rating, "summary": summary, "unixReviewTime": time, "reviewTime": "09 13, 2009",
    }  # fmt: skip


def review_2018(n: int, review: Review) -> dict[str, Any]:
    """Keys in another order; some are only there where there is something to say."""
    user, item, rating, time, summary, text = review
    some = {"style": {"Size:": " Large"}, "vote": "5", "image": ["http://x/y.jpg"]} if n % 2 else {}
    return (
        {"overall": rating, "verified": True, "reviewTime": "09 13, 2009", "reviewerID": user, "asin": item}
        | some
        | {"reviewerName": REVIEWERS[n % 2]}
        | ({"reviewText": text} if text else {})
        | ({"summary": summary} if summary else {})
        | {"unixReviewTime": time}
    )


def review_2023(n: int, review: Review) -> dict[str, Any]:
    """Times in ms; the item is the parent of what was bought."""
    user, item, rating, time, summary, text = review
    return {
        "rating": rating, "title": summary, "text": text, "images": [], "asin": f"B0CHILD{n:03}", "parent_asin": item,
        "user_id": user, "timestamp": time * 1000 + n, "helpful_vote": 0, "verified_purchase": True,
    }  # fmt: skip


def item_2014(item: str, title: str | None, path: list[str]) -> dict[str, Any]:
    """Categories are a list of paths."""
    return (
        {"asin": item, "description": 'it\'s "so"', "price": 3.17, "imUrl": "http://x/y.jpg"}
        | ({"title": title} if title else {})
        | {"related": {"also_bought": ["B00JHONN1S"]}, "salesRank": {"Toys": 211836}, "categories": [path]}
    )


def item_2018(item: str, title: str | None, path: list[str]) -> dict[str, Any]:
    """Where there should be a title, there may be a piece of the page."""
    return {
        "category": [*path, "</span></span></span>"], "tech1": "", "description": ["a"], "fit": "",
        "title": title or JUNK, "also_buy": [], "brand": "b", "rank": "1", "details": {}, "main_cat": "Toys",
        "price": "$7.41", "asin": item,
    }  # fmt: skip


def item_2023(item: str, title: str | None, path: list[str]) -> dict[str, Any]:
    return {
        "main_category": "Toys & Games", "title": title, "average_rating": 4.8, "rating_number": 10, "features": [],
        "description": [], "price": None, "images": [{"thumb": "x"}], "videos": [], "store": "s", "categories": path,
        "details": {"Package": "9 x 9"}, "parent_asin": item, "bought_together": None,
    }  # fmt: skip


def write_2014(folder: Path) -> None:
    """Reviews are JSON, metadata Python literals."""
    reviews = [json.dumps(review_2014(n, one)) for n, one in enumerate(REVIEWS)]
    pack(folder / "reviews_Toys_and_Games_5.json.gz", reviews)
    pack(folder / "meta_Toys_and_Games.json.gz", [repr(item_2014(i, *about)) for i, about in ITEMS.items()])


def write_2018(folder: Path) -> None:
    """One line of the metadata is there twice."""
    reviews = [json.dumps(review_2018(n, one)) for n, one in enumerate(REVIEWS)]
    pack(folder / "Toys_and_Games_5.json.gz", reviews)
    items = [json.dumps(item_2018(i, *about)) for i, about in ITEMS.items()]
    pack(folder / "meta_Toys_and_Games.json.gz", [*items, items[0]])


def write_2023(folder: Path) -> None:
    """One review has no parent."""
    reviews = [review_2023(n, one) for n, one in enumerate(REVIEWS)]
    reviews[3] |= {"asin": reviews[3]["parent_asin"], "parent_asin": None}
    pack(folder / "Toys_and_Games.jsonl.gz", map(json.dumps, reviews))
    items = [json.dumps(item_2023(i, *about)) for i, about in ITEMS.items()]
    pack(folder / "meta_Toys_and_Games.jsonl.gz", items)


def place_review(
    n: int, user: str, place: str, rating: int | None, time: int, text: str | None
) -> dict[str, Any]:
    answer = {"time": time + 5, "text": "Thank you"} if n % 2 else None
    return {
        "user_id": user, "name": REVIEWERS[n % 2], "time": time, "rating": rating, "text": text, "pics": None,
        "resp": answer, "gmap_id": place,
    }  # fmt: skip


def place(gmap_id: str, name: str | None, categories: list[str] | None) -> dict[str, Any]:
    return {
        "name": name, "address": "1 Main St", "gmap_id": gmap_id, "description": None, "latitude": 34.05,
        "longitude": -118.29, "category": categories, "avg_rating": 4.4, "num_of_reviews": 18, "price": "$$",
        "hours": [["Thursday", "6:30AM–6PM"]], "MISC": {"Amenities": ["Good for kids"]}, "state": "Open ⋅ Closes 6PM",
        "relative_results": ["0x80c2c778e3b73d33:0xbdc58662a4a97d49"], "url": "https://www.google.com/maps/place//data=x",
    }  # fmt: skip
