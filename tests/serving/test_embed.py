"""A dataset's users in a store: equal to the histories, resumed, brought up to date, refused where it does not fit."""

import json
import os
import threading
import time
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

from userllm.errors import UserError
from userllm.fusion.catalogue import CatalogueConfig
from userllm.fusion.history_text import HistoryTextConfig
from userllm.fusion.perceiver import PerceiverConfig
from userllm.serving import embed as embedding
from userllm.serving import store as on_disk
from userllm.serving.embed import DatasetUsers, check_current, embed, store_card
from userllm.serving.export import export_embeddings
from userllm.serving.store import LEFT_BEHIND, UserStore
from userllm.serving.user_side import UserSide

PERCEIVER = PerceiverConfig(latents=3, layers=1, heads=2)


def stored(model, dataset, folder, users=None, progress=lambda done, of: None, **keep):
    """The store and what became of the users."""
    source = DatasetUsers(UserSide.of(model), dataset)
    store = UserStore.open(folder, store_card(source.side, dataset, **keep))
    told = embed(source, store, users, progress)
    store.compact()
    return store, told


@pytest.fixture
def small_blocks(monkeypatch):
    """Five users to a file."""
    monkeypatch.setattr(on_disk, "BLOCK_USERS", 5)


@pytest.mark.parametrize(
    ("kind", "fusion", "keep"),
    [
        ("autoregressive", {}, {}),
        ("autoregressive", {"perceiver": PERCEIVER, "catalogue": CatalogueConfig()}, {"keys_values": True}),
        ("autoregressive", {"kind": "soft_prompt"}, {"state": True}),
        ("bert4rec", {"catalogue": CatalogueConfig()}, {}),
        ("dual", {"text": HistoryTextConfig(events=2)}, {"keys_values": True}),
    ],
)
def test_answers_from_a_store_are_those_of_the_histories(
    make_user_llm, make_encoder, dataset, tmp_path, small_blocks, kind, fusion, keep
):
    model = make_user_llm(encoder=make_encoder(kind, max_length=8), **fusion)
    store, told = stored(model, dataset, tmp_path / "store", **keep)
    assert (told.asked, told.new, told.known, told.extended, told.anew.total()) == (24, 24, 0, 0, 0)
    assert sorted(store) == sorted(dataset.user_ids) and len(store) == 24
    assert len(list((tmp_path / "store").glob("*.safetensors"))) == 5
    users = ["u7", "u0", "u23", "u5"]
    histories = [dataset.history(dataset.user_index(user)) for user in users]
    again = UserStore.read(tmp_path / "store", model)
    records = [again[user] for user in users]
    assert [len(record) for record in records] == [len(history) for history in histories]
    expected = model.score(histories)
    torch.testing.assert_close(model.score(records), expected, atol=1e-4, rtol=1e-4)
    context = again.context(users, model)
    with model.attending(context) if model.config.has_prefix else model.conditioned(context):
        pass
    lists = zip(model.recommend(records, 4), model.recommend(histories, 4), strict=True)
    assert all([a.item for a in ours] == [a.item for a in theirs] for ours, theirs in lists)


def test_batches_and_files_are_as_large_as_allowed(make_user_llm, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "USERS", 10)
    monkeypatch.setattr(embedding, "BATCH_EVENTS", 30)
    monkeypatch.setattr(on_disk, "BLOCK_BYTES", 5_000)
    model = make_user_llm()
    store, told = stored(model, dataset, tmp_path / "store", keys_values=True)
    assert told.new == len(store) == 24
    files = list((tmp_path / "store").glob("*.safetensors"))
    assert len(files) > 5 and max(file.stat().st_size for file in files) < 15_000
    for user in (0, 7, 23):
        expected = model.remember(dataset.history(user)).embeddings
        torch.testing.assert_close(store[f"u{user}"].embeddings, expected, atol=1e-5, rtol=1e-4)
    monkeypatch.setattr(embedding, "BATCH_NUMBERS", 3 * 5 * 2 * 32)  # keys and values of three users
    source = DatasetUsers(UserSide.of(model), dataset)
    sizes = [len(batch) for batch in source._batches(range(24), lambda user: 1, store.card.kept)]
    assert set(sizes) == {3} and sum(sizes) == 24


def test_half_floats_take_half_the_space_and_cost_little(make_user_llm, dataset, tmp_path):
    model = make_user_llm(perceiver=PERCEIVER)
    sizes = {}
    for dtype in ("float32", "float16"):
        store, _ = stored(model, dataset, tmp_path / dtype, dtype=dtype, keys_values=True)
        sizes[dtype] = sum(file.stat().st_size for file in (tmp_path / dtype).glob("*.safetensors"))
        scores = model.score(store["u7"])
        torch.testing.assert_close(
            scores, model.score(dataset.history(7)), atol=1e-4 if dtype == "float32" else 0.05, rtol=0
        )
    assert sizes["float16"] < 0.7 * sizes["float32"]


def test_the_latest_record_of_a_user_counts_whoever_wrote_it(make_user_llm, dataset, tmp_path, small_blocks):
    """A store that was opened before another process added to it."""
    model = make_user_llm()
    first, _ = stored(model, dataset, tmp_path / "store", users=["u1"])
    stored(model, dataset, tmp_path / "store")
    newer = replace(first["u1"], embeddings=first["u1"].embeddings + 1)
    first.put([newer])
    again = UserStore.read(tmp_path / "store")["u1"]
    assert torch.equal(again.embeddings, newer.embeddings)


def test_what_another_process_wrote_stays_the_latest_when_files_are_put_together(
    make_user_llm, dataset, tmp_path
):
    """A store that was opened before another one added to it, and then is put together."""
    model, folder = make_user_llm(), tmp_path / "store"
    store, _ = stored(model, dataset, folder, users=["u1", "u2", "u3", "u4"])
    store.put([store["u3"], store["u4"]])  # so half of the first file is worn
    first, second = UserStore.read(folder), UserStore.read(folder)
    newer = replace(second["u1"], embeddings=second["u1"].embeddings + 1)
    second.put([newer])
    first.put([first["u2"]])
    first.compact()
    for one in (first, UserStore.read(folder)):
        assert torch.equal(one["u1"].embeddings, newer.embeddings)
        assert sorted(one) == ["u1", "u2", "u3", "u4"]
    assert all(file.is_file() for file in first._blocks)


def test_a_slow_writer_is_waited_for(make_user_llm, dataset, tmp_path, monkeypatch):
    """What is written last counts, also where others put files together in the meantime."""
    model, folder = make_user_llm(), tmp_path / "store"
    stored(model, dataset, folder, users=["u1", "u2", "u3", "u4"])
    slow, other = UserStore.read(folder), UserStore.read(folder)
    newer = replace(slow["u1"], embeddings=slow["u1"].embeddings + 1)
    writing, go_on, own = threading.Event(), threading.Event(), on_disk.save_tensors

    def late(tensors, file, metadata):
        if threading.current_thread() is not threading.main_thread():
            writing.set()
            go_on.wait(10)
        own(tensors, file, metadata)

    monkeypatch.setattr(on_disk, "save_tensors", late)
    thread = threading.Thread(target=slow.put, args=([newer],))
    thread.start()
    assert writing.wait(10)
    threading.Timer(0.2, go_on.set).start()
    other.put([other["u3"], other["u4"]])
    other.compact()
    thread.join()
    assert torch.equal(UserStore.read(folder)["u1"].embeddings, newer.embeddings)


def test_large_files_of_few_users_stay_as_they_are(make_user_llm, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(on_disk, "BLOCK_BYTES", 1)  # a user to a file, each of them full
    monkeypatch.setattr(on_disk, "FEW_USERS", 4)
    stored(make_user_llm(), dataset, tmp_path / "store")
    files = set((tmp_path / "store").glob("*.safetensors"))
    assert len(files) == 24
    UserStore.read(tmp_path / "store").compact()
    assert set((tmp_path / "store").glob("*.safetensors")) == files


def test_a_file_that_goes_while_a_store_is_opened_is_no_damage(
    make_user_llm, dataset, tmp_path, monkeypatch, small_blocks
):
    """Another process has put it together with others since the folder was listed."""
    stored(make_user_llm(), dataset, tmp_path / "store")
    own, gone = on_disk._Block, []

    def late(file):
        if not gone:
            gone.append(file)
            file.rename(file.with_name(file.name.replace("-", "-z")))
        return own(file)

    monkeypatch.setattr(on_disk, "_Block", late)
    assert len(UserStore.read(tmp_path / "store")) == 24
    assert gone


def test_users_can_be_taken_out(make_user_llm, dataset, tmp_path, small_blocks):
    """Of every file, older records of theirs included; everybody else stays as they are."""
    model, folder = make_user_llm(), tmp_path / "store"
    store, _ = stored(model, dataset, folder)
    before = {user: store[user].embeddings for user in store}
    store.put([store["u1"], store["u2"]])
    store.remove(["u1", "u7"])
    for one in (store, UserStore.read(folder)):
        assert sorted(one) == sorted(set(before) - {"u1", "u7"})
        assert all(torch.equal(one[user].embeddings, before[user]) for user in one)
    named = [user for file in folder.glob("*.safetensors") for user in on_disk._Block(file).users]
    assert not {"u1", "u7"} & set(named)
    with pytest.raises(UserError, match="no user 'u7'"):
        store.remove(["u7"])
    store.remove(["u7", "u8"], missing_ok=True)
    store.remove("u10")  # one user, and not the letters of a name
    assert sorted(UserStore.read(folder)) == sorted(set(before) - {"u1", "u7", "u8", "u10"})


def test_an_interrupted_command_goes_on(make_user_llm, dataset, tmp_path, small_blocks):
    model = make_user_llm()

    def interrupt(done, of):
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stored(model, dataset, tmp_path / "store", progress=interrupt)
    half, writing = (
        tmp_path / "store" / f".{name}.safetensors.partial" for name in ("000003-beef", "000004-cafe")
    )
    for file in (half, writing):
        file.write_bytes(b"half of a file")
    os.utime(half, (0, time.time() - 2 * LEFT_BEHIND))
    assert len(UserStore.read(tmp_path / "store")) == 10
    assert json.loads((tmp_path / "store" / "card.json").read_text())["fingerprint"] is None
    seen = []
    store, told = stored(
        model, dataset, tmp_path / "store", progress=lambda done, of: seen.append((done, of))
    )
    assert (told.known, told.new) == (10, 14)
    assert seen[-1] == (24, 24)
    assert len(store) == 24 and list((tmp_path / "store").glob(".*.partial")) == [
        writing
    ]  # another process's
    assert store.card.fingerprint == dataset.card.fingerprint
    whole, _ = stored(model, dataset, tmp_path / "whole")
    for user in whole:
        assert torch.equal(whole[user].embeddings, store[user].embeddings)


def test_only_users_with_new_events_are_computed(
    make_user_llm, make_encoder, cut, dataset, tmp_path, monkeypatch, small_blocks
):
    model = make_user_llm(encoder=make_encoder(positions="relative_time", max_length=16))
    # user 16 adds one event, 8 four, 7 goes past what the encoder sees, 3's past is another, 4 is new to the store
    old = cut({16: 12, 8: 4, 7: 12}, moved=(3,))
    users = [user for user in old.user_ids if user != "u4"]
    stored(model, old, tmp_path / "store", users, state=True)
    read = []
    encoder = model.encoder.extend
    monkeypatch.setattr(
        model.encoder,
        "extend",
        lambda state, batch: read.append(int(batch.mask.sum())) or encoder(state, batch),
    )
    whole = cut()
    store, told = stored(model, whole, tmp_path / "store", state=True)
    length = {user: int(whole.lengths[user]) for user in (3, 4, 7, 8, 16)}
    assert length[7] > 16 and length[16] == 13
    assert (told.known, told.new, told.extended) == (19, 1, 2)
    assert dict(told.anew) == {
        "more events than the encoder sees, so its window moves": 1,
        "earlier events are not what they were": 1,
    }
    assert sum(read) == length[3] + length[4] + 16 + 1 + (length[8] - 4)
    for user in (3, 4, 7, 8, 16):
        history = dataset.history(user)
        expected = model.remember(history)
        record = store[f"u{user}"]
        torch.testing.assert_close(record.embeddings, expected.embeddings, atol=1e-5, rtol=1e-4)
        assert len(record) == len(history) and torch.equal(record.seen, expected.seen)
        assert (record.state is not None) == (len(history) < 16)
    _, told = stored(model, whole, tmp_path / "store", state=True)
    assert (told.known, told.new, told.extended, told.anew.total()) == (24, 0, 0, 0)


def test_without_a_state_whoever_has_new_events_is_computed_anew(make_user_llm, cut, tmp_path):
    model = make_user_llm(max_length=20)
    stored(model, cut({7: 8}), tmp_path / "store")
    store, told = stored(model, cut(), tmp_path / "store")
    assert dict(told.anew) == {"its record keeps no encoder state": 1} and told.known == 23
    assert "1 anew: its record keeps no encoder state" in str(told)
    expected = model.remember(cut().history(7)).embeddings
    torch.testing.assert_close(store["u7"].embeddings, expected, atol=1e-5, rtol=1e-4)


def test_files_with_old_records_go(make_user_llm, cut, tmp_path, monkeypatch):
    monkeypatch.setattr(on_disk, "BLOCK_USERS", 2)
    model = make_user_llm(max_length=16)
    lengths = dict.fromkeys(range(24), 3)
    for step in range(6):  # twelve users add an event, again and again
        lengths |= {user: 3 + step for user in range(0, 24, 2) if step}
        store, _ = stored(model, cut(lengths), tmp_path / "store", state=True)
    files = list((tmp_path / "store").glob("*.safetensors"))
    held = sum(len(json.loads(block._open.metadata()["users"])) for block in store._blocks.values())
    assert len(store) == 24 and set(files) == set(store._blocks)
    assert held <= 2 * len(store)  # at least half of what is kept counts
    data = cut(lengths)
    for user in range(24):
        expected = model.remember(data.history(user)).embeddings
        torch.testing.assert_close(store[f"u{user}"].embeddings, expected, atol=1e-5, rtol=1e-4)


def test_small_files_are_put_together(make_user_llm, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(on_disk, "FEW_USERS", 6)
    model = make_user_llm()
    for n in range(7):
        store, _ = stored(model, dataset, tmp_path / "store", [f"u{3 * n}", f"u{3 * n + 1}"])
    assert len(store) == 14
    assert len(list((tmp_path / "store").glob("*.safetensors"))) == 2  # six and one
    again = UserStore.read(tmp_path / "store", model)
    torch.testing.assert_close(
        model.score(again["u7"]), model.score(dataset.history(7)), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("other", "part"),
    [
        ({"max_length": 7}, "encoder"),
        ({"stir": True}, "encoder"),  # trained a little more
        ({"seed": 1}, "fusion"),
        ({"events": 4}, "fusion"),
        ({"perceiver": PERCEIVER}, "fusion"),
        ({"catalogue": CatalogueConfig()}, "fusion"),
        ({"text": HistoryTextConfig(events=2)}, "fusion"),
    ],
)
def test_another_model_is_refused_with_the_reason(
    make_user_llm, make_encoder, dataset, tmp_path, other, part
):
    def model_with(max_length=8, **other):
        return make_user_llm(encoder=make_encoder(max_length=max_length), **({"stir": False} | other))

    stored(model_with(), dataset, tmp_path / "store")
    model = model_with(**other)
    reason = rf"another model computed these users: its {part} has sha256"
    with pytest.raises(UserError, match=reason):
        UserStore.read(tmp_path / "store", model)
    with pytest.raises(UserError, match=reason):
        stored(model, dataset, tmp_path / "store")
    assert UserStore.read(tmp_path / "store", model_with()) is not None


def test_another_catalogue_or_head_count_is_another_model(make_user_llm, make_encoder, dataset):
    model = make_user_llm(stir=False, encoder=make_encoder(max_length=8))
    plain = UserSide.of(model).version()
    model.collator.item_fields["genres"] = model.collator.item_fields["genres"].copy()
    before = model.collator.item_fields["genres"][0, 0]
    model.collator.item_fields["genres"][0, 0] = 1 + before % 4
    try:
        assert UserSide.of(model).version()["catalogue"] != plain["catalogue"]
    finally:
        model.collator.item_fields["genres"][0, 0] = before
    heads = UserSide.of(make_user_llm(stir=False, encoder=make_encoder(max_length=8, heads=4))).version()
    assert heads["encoder"] != plain["encoder"] and heads["fusion"] == plain["fusion"]


def test_another_dataset_and_other_settings_are_refused(make_user_llm, make_encoder, cut, tmp_path):
    model = make_user_llm()
    stored(model, cut(), tmp_path / "store")
    with pytest.raises(UserError, match="this store's dataset is small, not large"):
        stored(model, cut(name="large"), tmp_path / "store")
    for keep in ({"dtype": "float16"}, {"keys_values": True}, {"state": True}):
        with pytest.raises(UserError, match=rf"this store's {next(iter(keep))} is .*; give another folder"):
            stored(model, cut(), tmp_path / "store", **keep)
    with pytest.raises(UserError, match="of no use: a dual encoder"):
        stored(make_user_llm(encoder=make_encoder("dual")), cut(), tmp_path / "other", state=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is no store of users"):
        stored(model, cut(), tmp_path / "full")
    with pytest.raises(UserError, match="no user 'nobody'; users look like"):
        UserStore.read(tmp_path / "store", model)["nobody"]
    with pytest.raises(UserError, match="no user 'nobody'"):
        stored(model, cut(), tmp_path / "store", ["u3", "nobody"])
    with pytest.raises(UserError, match="nowhere: no store of users; `userllm embed"):
        UserStore.read(tmp_path / "nowhere")
    card = tmp_path / "store" / "card.json"
    card.write_text(card.read_text().replace('"format_version": 1', '"format_version": 9'))
    with pytest.raises(UserError, match="format_version is 9, this userllm reads 1"):
        UserStore.read(tmp_path / "store")


def test_a_damaged_file_is_named(make_user_llm, dataset, tmp_path):
    model = make_user_llm()
    stored(model, dataset, tmp_path / "store")
    [file] = (tmp_path / "store").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(UserError, match=rf"{file.name}: cannot be read .*; remove it"):
        UserStore.read(tmp_path / "store")
    file.unlink()
    _, told = stored(model, dataset, tmp_path / "store")
    assert told.new == 24


def test_a_stale_record_is_noticed(make_user_llm, cut, tmp_path):
    model = make_user_llm()
    side = UserSide.of(model)
    store, _ = stored(model, cut({7: 8}), tmp_path / "store")
    check_current(store, "u6", side, cut())
    with pytest.raises(
        UserError, match=r"made of 8 events of user u7, .* has others .*; bring the store up to date"
    ):
        check_current(store, "u7", side, cut())


def test_a_catalogue_of_other_items_is_refused(make_user_llm, dataset, tmp_path):
    model = make_user_llm()
    side = UserSide.of(model)
    side.collator = type(side.collator)(
        dataset.items.with_columns(pl.col("id") + "x", pl.col("title") + "x"), side.collator.vocabulary
    )
    with pytest.raises(UserError, match="the model knows none of its items"):
        DatasetUsers(side, dataset)


def test_a_model_that_knows_other_rows_reads_the_same(make_user_llm, make_encoder, dataset, tmp_path):
    """The dataset's items are looked up by id: a model whose table has another order gives what histories give."""
    model = make_user_llm()
    shuffled = dataset.items.sample(fraction=1, shuffle=True, seed=1).head(15)
    model.collator = type(model.collator)(shuffled, model.collator.vocabulary)
    store, _ = stored(model, dataset, tmp_path / "store")
    with pytest.warns(UserWarning, match="never seen"):
        expected = model.remember(dataset.history(7))
    torch.testing.assert_close(store["u7"].embeddings, expected.embeddings, atol=1e-5, rtol=1e-4)
    assert torch.equal(store["u7"].seen, expected.seen)


def test_the_model_folder_alone_reads_users(make_user_llm, make_encoder, dataset, tmp_path):
    """No language model is loaded; the versions are equal, and so are the records."""
    for number, fusion in enumerate(
        [{"perceiver": PERCEIVER}, {"kind": "soft_prompt", "catalogue": CatalogueConfig()}]
    ):
        model = make_user_llm(encoder=make_encoder("bert4rec", max_length=8), **fusion)
        model.save_pretrained(tmp_path / f"model{number}")
        side = UserSide.load(tmp_path / f"model{number}")
        assert side.version() == UserSide.of(model).version()
        folder = tmp_path / f"store{number}"
        store = UserStore.open(folder, store_card(side, dataset, keys_values=True))
        embed(DatasetUsers(side, dataset), store, ["u7", "u5"])
        histories = [dataset.history(7), dataset.history(5)]
        records = [UserStore.read(folder, model)[user] for user in ("u7", "u5")]
        torch.testing.assert_close(model.score(records), model.score(histories), atol=1e-4, rtol=1e-4)
    text = make_user_llm(text=HistoryTextConfig(events=2))
    text.save_pretrained(tmp_path / "text")
    with pytest.raises(UserError, match="load the whole model"):
        UserSide.load(tmp_path / "text")


def test_exported_embeddings(make_user_llm, dataset, tmp_path):
    model = make_user_llm()
    store, _ = stored(model, dataset, tmp_path / "store", dtype="float16")
    assert export_embeddings(store, tmp_path / "out [1]" / "users.parquet") == 24
    table = pl.read_parquet(tmp_path / "out [1]" / "users.parquet", glob=False)
    assert table.columns == ["user", "events", "embedding"]
    assert table["user"].to_list() == sorted(dataset.user_ids)
    assert table["embedding"].dtype == pl.Array(pl.Float32, 16)
    for user, events, vector in table.iter_rows():
        history = dataset.history(dataset.user_index(user))
        assert events == len(history)
        np.testing.assert_allclose(vector, model.encode(history)[-1].numpy(), atol=5e-3)
    rows = export_embeddings(store, tmp_path / "every.parquet", every=True)
    every = pl.read_parquet(tmp_path / "every.parquet")
    assert rows == len(every) == sum(min(5, int(n)) for n in dataset.lengths)
    mine = every.filter(user="u7").sort("back", descending=True)
    assert mine["back"].to_list() == [4, 3, 2, 1, 0]
    np.testing.assert_allclose(
        np.array(mine["embedding"].to_list()), model.encode(dataset.history(7))[-5:].numpy(), atol=5e-3
    )


def test_a_user_without_events_has_no_embedding(make_user_llm, tmp_path):
    from userllm.events import UserHistory

    model = make_user_llm()
    store = UserStore.open(tmp_path / "store", store_card(UserSide.of(model)))
    store.put([model.remember(UserHistory((), "nobody")), model.remember(UserHistory((), "no one"))])
    assert export_embeddings(store, tmp_path / "users.parquet") == 2
    assert pl.read_parquet(tmp_path / "users.parquet")["embedding"].to_list() == [None, None]
    torch.testing.assert_close(model.score(store["nobody"]), model.score(UserHistory(())))


def test_opening_reads_no_record(make_user_llm, dataset, tmp_path):
    """A store is opened from the headers of its files; a user's rows are read when they are asked for."""
    model = make_user_llm()
    stored(model, dataset, tmp_path / "store")
    began = time.perf_counter()
    store = UserStore.read(tmp_path / "store")
    assert time.perf_counter() - began < 5
    assert all(not block._at for block in store._blocks.values())
    store.column("u7", "events")
    assert [set(block._at) for block in store._blocks.values()] == [{"events"}]
