from userllm.data.sources.synthetic import prepare_synthetic, prepare_synthetic_reviews


def test_a_generated_dataset_says_so_and_is_always_the_same(tmp_path):
    first, second = prepare_synthetic(tmp_path / "a"), prepare_synthetic(tmp_path / "b")
    assert first.card.name == "synthetic" and first.card.source.kind == "generated"
    assert first.card.fingerprint == second.card.fingerprint
    assert first.lengths.min() >= 15 and len(set(first.items["title"])) == first.num_items


def test_generated_reviews_say_so_and_are_always_the_same(tmp_path):
    first, second = prepare_synthetic_reviews(tmp_path / "a"), prepare_synthetic_reviews(tmp_path / "b")
    assert first.card.name == "synthetic-reviews" and first.card.source.kind == "generated"
    assert first.card.fingerprint == second.card.fingerprint
    assert first.lengths.min() >= 6 and first.lengths.max() <= 12
    texts = first.event_texts("text", range(first.num_events))
    assert all(texts) and len(set(texts)) > 20
    assert set(first.items["category"]) == {title.split()[0] for title in first.items["title"]}
