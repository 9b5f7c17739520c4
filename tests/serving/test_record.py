"""A user who is remembered gets the answers of their history, and goes on as if it had been read whole."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from userllm.errors import UserError
from userllm.events import Event, UserHistory
from userllm.fusion.catalogue import CatalogueConfig
from userllm.fusion.history_text import HistoryTextConfig
from userllm.fusion.perceiver import PerceiverConfig
from userllm.serving.record import UserRecord

PERCEIVER = PerceiverConfig(latents=3, layers=2, heads=2)
WAYS = {
    "cross-attention": {},
    "attend from the answer on": {"attend": "answer"},
    "Perceiver": {"perceiver": PERCEIVER},
    "mlp": {"projection": "mlp"},
    "catalogue": {"catalogue": CatalogueConfig()},
    "Perceiver, catalogue": {"perceiver": PERCEIVER, "catalogue": CatalogueConfig()},
    "soft prompt": {"kind": "soft_prompt"},
    "soft prompt, Perceiver, catalogue": {
        "kind": "soft_prompt",
        "perceiver": PERCEIVER,
        "catalogue": CatalogueConfig(),
    },
    "long and short": {"text": HistoryTextConfig(events=2, lead="Seen:")},
    "text alone": {"strategy": "lora", "kind": "none", "text": HistoryTextConfig(events=3, lead="Seen:")},
}
KINDS = {
    "autoregressive": {},
    "autoregressive, relative time": {"positions": "relative_time"},
    "dual": {},
    "bert4rec": {},
}


def same_answers(model, remembered, histories):
    """Scores of the whole catalogue, and lists, of users both ways; users' differ from one another."""
    expected = model.score(histories)
    found = model.score(remembered)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    lists = zip(model.recommend(remembered, 4), model.recommend(histories, 4), strict=True)
    for ours, theirs in lists:
        assert [answer.item for answer in ours] == [answer.item for answer in theirs]
    written = model.generate("I like", remembered[0], max_new_tokens=4)
    assert written == model.generate("I like", histories[0], max_new_tokens=4)


@pytest.fixture
def three(dataset):
    """11 events (more than the encoder sees), 4, and none."""
    return [dataset.history(7, 0, 11), dataset.history(5, 0, 4), UserHistory(())]


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        *(("autoregressive", way) for way in WAYS),
        *(("dual", way) for way in ("cross-attention", "Perceiver, catalogue", "long and short")),
    ],
)
def test_remembered_is_as_read(make_user_llm, make_encoder, three, kind, way):
    model = make_user_llm(encoder=make_encoder(kind, max_length=8), **WAYS[way])
    records = [model.remember(history) for history in three]
    same_answers(model, records, three)
    again = [UserRecord.from_columns("u", record.columns()) for record in records]  # as a file has them
    torch.testing.assert_close(model.score(again), model.score(records))


@pytest.mark.parametrize(
    ("kind", "way"),
    [("autoregressive", "cross-attention"), *((kind, "Perceiver, catalogue") for kind in KINDS)],
)
def test_with_keys_and_values_the_user_is_not_projected_again(
    make_user_llm, make_encoder, three, kind, way, monkeypatch
):
    model = make_user_llm(encoder=make_encoder(kind.split(",")[0], max_length=8, **KINDS[kind]), **WAYS[way])
    records = [model.remember(history, keys_values=True, state=kind != "dual") for history in three]
    same_answers(model, records, three)
    for block in model.attachment.blocks.values():
        monkeypatch.setattr(block, "project_users", None)
    model.score(records)
    model.score(records[2])
    with pytest.raises(TypeError):
        model.score(three)


@pytest.mark.parametrize(
    ("kind", "way", "keys_values"),
    [
        ("autoregressive", "cross-attention", True),
        ("autoregressive, relative time", "cross-attention", False),
        ("autoregressive, relative time", "soft prompt, Perceiver, catalogue", False),
    ],
)
def test_new_events_one_by_one_are_as_the_whole_history(
    make_user_llm, make_encoder, dataset, kind, way, keys_values
):
    encoder = make_encoder(kind.split(",")[0], max_length=10, **KINDS[kind])
    model = make_user_llm(encoder=encoder, **WAYS[way])
    whole, other = dataset.history(7, 0, 10), dataset.history(5)
    record = model.remember(UserHistory(()), keys_values=keys_values, state=True)
    for end in range(1, 11):
        record = model.extend(record, whole.events[end - 1 : end])
        assert len(record) == end
    at_once = model.extend(model.remember(dataset.history(7, 0, 4), state=True), whole.events[4:])
    expected = model.remember(whole)
    torch.testing.assert_close(record.embeddings, expected.embeddings, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(at_once.embeddings, expected.embeddings, atol=1e-5, rtol=1e-4)
    assert torch.equal(record.seen, expected.seen) and torch.equal(at_once.seen, expected.seen)
    same_answers(model, [record, model.remember(other)], [whole, other])
    unchanged = model.extend(at_once, []) if at_once.state is not None else at_once
    torch.testing.assert_close(unchanged.embeddings, expected.embeddings, atol=1e-5, rtol=1e-4)


def test_gaps_in_time_are_those_of_the_whole_history(make_user_llm, make_encoder, catalogue, dataset):
    """The field time_gap of the first new event knows of the last old one, in any state it went through."""
    from userllm.data.collation import HistoryCollator
    from userllm.data.vocabulary import Vocabulary
    from userllm.model import encoder_for

    vocabulary = Vocabulary.from_dataset(dataset, ("item", "rating", "time_gap"))
    torch.manual_seed(3)
    encoder = encoder_for(vocabulary, make_encoder(positions="relative_time").config).eval()
    model = make_user_llm(encoder=encoder)
    model.collator = HistoryCollator(catalogue, vocabulary)
    rng = np.random.default_rng(0)
    times = np.cumsum(rng.choice([5, 4_000, 90_000, 3_000_000], size=9)).tolist()
    events = [Event(f"m{n}", t, {"rating": 1.0 + n % 5}) for n, t in enumerate(times)]
    events[5] = Event("m5")  # nobody knows when
    for cut in range(10):
        record = model.extend(model.remember(UserHistory(events[:cut]), state=True), events[cut:])
        expected = model.remember(UserHistory(events)).embeddings
        torch.testing.assert_close(record.embeddings, expected, atol=1e-5, rtol=1e-4)
    moved = model.remember(UserHistory([*events[:8], Event("m8", times[7] + 1, events[8].fields)])).embeddings
    assert (moved[-1] - expected[-1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("encoder", "fusion", "reason"),
    [
        ({}, {}, "8 events and 1 new ones are more than the 8 the encoder sees"),
        ({"count_from": "end"}, {}, "count_from is end"),
        ({"kind": "bert4rec"}, {}, "knows all events"),
        ({"kind": "dual"}, {}, "one embedding of the whole history"),
        ({"max_length": 12}, {"text": HistoryTextConfig(events=2)}, "writes out earlier events"),
    ],
)
def test_what_cannot_be_continued_says_why(make_user_llm, make_encoder, dataset, encoder, fusion, reason):
    model = make_user_llm(encoder=make_encoder(**({"max_length": 8} | encoder)), **fusion)
    record = model.remember(dataset.history(7, 0, 8), state=True)
    with pytest.raises(UserError, match=rf"{reason}.*; use remember\(history\)"):
        model.extend(record, dataset.history(7, 8, 9).events)


def test_events_go_oldest_first(make_user_llm):
    events = [Event("m0", 100), Event("m1"), Event("m2", 100), Event("m3", 200)]
    record = make_user_llm().remember(UserHistory(events), state=True)
    with pytest.raises(UserError, match=r"events\[1\] \('m2', time 100\) is earlier than 'm3' \(time 200\)"):
        UserHistory(events[:1:-1] + events[:1])
    with pytest.raises(UserError, match=r"'m4' \(time 199\) is earlier than the latest event .*remember"):
        make_user_llm().extend(record, [Event("m5"), Event("m4", 199)])
    assert len(make_user_llm().extend(record, [Event("m4", 200)])) == 5


def test_a_record_without_a_state_says_so(make_user_llm, dataset):
    model = make_user_llm()
    with pytest.raises(UserError, match="keeps no encoder state"):
        model.extend(model.remember(dataset.history(5, 0, 3)), dataset.history(5, 3, 4).events)


def test_histories_and_records_go_together(make_user_llm, three):
    model = make_user_llm(catalogue=CatalogueConfig())
    mixed = [model.remember(three[0], keys_values=True), three[1], three[2]]
    torch.testing.assert_close(model.score(mixed), model.score(three), atol=1e-4, rtol=1e-4)
    assert len(model.recommend(mixed, 3)) == 3
    one = model.recommend(mixed[0], 3)
    assert [answer.item for answer in one] == [answer.item for answer in model.recommend(three[0], 3)]


def test_another_models_record_is_refused(make_user_llm, make_encoder, dataset):
    plain = make_user_llm(encoder=make_encoder("dual", max_length=8))
    record = plain.remember(dataset.history(7))
    picky = make_user_llm(encoder=make_encoder("dual", max_length=8), catalogue=CatalogueConfig())
    with pytest.raises(UserError, match="holds no scores of the catalogue"):
        picky.score(record)
    with pytest.raises(UserError, match="holds no user tokens"):
        make_user_llm(perceiver=PERCEIVER).score(make_user_llm().remember(dataset.history(7)))


def test_threads_that_extend_one_record_get_their_own(make_user_llm, make_encoder, dataset):
    model = make_user_llm(encoder=make_encoder("autoregressive", max_length=16))
    history, items = dataset.history(5, 0, 4), dataset.items["id"].to_list()[:6]
    late = max(event.time for event in history.events if event.time is not None) + 1
    expected = {
        item: model.extend(model.remember(history, state=True), [Event(item, late)]) for item in items
    }
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(15):
            record, barrier = model.remember(history, state=True), threading.Barrier(len(items))

            def go(item, record=record, barrier=barrier):
                barrier.wait()
                return model.extend(record, [Event(item, late)])

            with ThreadPoolExecutor(len(items)) as pool:
                found = dict(zip(items, pool.map(go, items), strict=True))
            for item in items:
                ours, theirs = found[item].columns()["state"], expected[item].columns()["state"]
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    finally:
        sys.setswitchinterval(before)


def test_an_event_is_given_to_extend(make_user_llm, dataset):
    model = make_user_llm()
    with pytest.raises(UserError, match=r"events\[0\] is 'i3'; give Event"):
        model.extend(model.remember(dataset.history(5, 0, 4), state=True), ["i3"])
