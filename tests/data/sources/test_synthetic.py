from userllm.data.sources.synthetic import prepare_synthetic


def test_a_generated_dataset_says_so_and_is_always_the_same(tmp_path):
    first, second = prepare_synthetic(tmp_path / "a"), prepare_synthetic(tmp_path / "b")
    assert first.card.name == "synthetic" and first.card.source.kind == "generated"
    assert first.card.fingerprint == second.card.fingerprint
    assert first.lengths.min() >= 15 and len(set(first.items["title"])) == first.num_items
