import pytest
import torch

from userllm.errors import UserError
from userllm.fusion.config import FusionConfig
from userllm.fusion.history_summary import HistorySummary
from userllm.fusion.history_text import HistoryTextConfig, SummaryConfig
from userllm.language_models.tiny import tiny_tokenizer
from userllm.model import UserLLM, event_texts

TEXT = HistoryTextConfig(events=2, lead="Seen:", close=".", summary=SummaryConfig(lead="User:", new_tokens=4))


@pytest.fixture
def asked():
    return []


@pytest.fixture
def summary(stored, asked):
    def summarize(texts):
        asked.append(list(texts))
        return [f"likes {len(text)}" for text in texts]

    return HistorySummary(TEXT, event_texts(stored.collator), tiny_tokenizer(), summarize)


def test_the_latest_events_are_summarised(summary, dataset, stored, asked):
    histories = stored.batch([(7, 0, 6), (5, 0, 2), (2, 0, 0)])
    ids, mask = summary(histories, torch.tensor([0, 1, 2, 0]), torch.tensor([6, 2, 0, 6]))
    titles = dict(zip(dataset.items["id"], dataset.items["title"], strict=True))
    shown = "".join(f" {titles[event.item]};" for event in dataset.history(7, 4, 6).events)
    assert asked[0][0] == f"Seen:{shown}."
    assert len(asked[0]) == 2  # equal histories are summarised once, an empty one never
    read = summary.tokenizer.decode(ids[0][mask[0]])
    assert read == f"User: likes {len(asked[0][0])}."
    assert not mask[2].any() and mask[:, -1].tolist() == [True, True, False, True]
    summary(histories, torch.tensor([0]), torch.tensor([6]))
    assert len(asked) == 1


def test_a_model_writes_and_remembers_its_summaries(make_user_llm, dataset, tmp_path):
    model = make_user_llm("lora", kind="none", text=TEXT)
    history = dataset.history(7)
    before = model.recommend(history, 3)
    assert model.summarizer.written == 1
    assert model.summarizer.described()["lm"] == "tiny-random-llama"
    model.save_pretrained(tmp_path / "model")
    loaded = UserLLM.from_pretrained(tmp_path / "model")
    assert loaded.config == model.config
    assert [one.item for one in loaded.recommend(history, 3)] == [one.item for one in before]
    assert loaded.summarizer.written == 0


def test_settings_that_contradict():
    with pytest.raises(UserError, match=r"fusion.text.events"):
        FusionConfig(text=HistoryTextConfig(summary=SummaryConfig())).check()
