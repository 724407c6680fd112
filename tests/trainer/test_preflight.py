"""Checks before the first step."""

import pytest
import torch

from trainer.preflight import check_fp8


def test_fp8_is_refused_on_a_gpu_without_it_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = (8, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(ValueError, match=r"capability 8.9 or above.*NVIDIA A100 has none: set fp8=false"):
        check_fp8(torch.device("cuda"))
    check_fp8(torch.device("cpu"))
    capability = (9, 0)
    check_fp8(torch.device("cuda"))
