import pytest
import torch

from userllm.pipeline.machine import peaks_mb


def test_memory_of_the_gpu_is_told_where_there_is_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert set(peaks_mb()) == {"peak_rss_mb"} and peaks_mb()["peak_rss_mb"] > 10
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**20)
    assert peaks_mb()["peak_gpu_mb"] == 3
