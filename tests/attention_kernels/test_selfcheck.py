"""The self-check passes on sound kernels and stops on wrong ones."""

import pytest
import torch

from attention_kernels import SemiLocalMask, selfcheck
from attention_kernels.attention.hopper import launchers as hopper
from attention_kernels.attention.portable import launchers as portable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "_LENGTHS", (0, 3, 70))
    monkeypatch.setattr(selfcheck, "_TARGETS", (0, 1, 3))
    mask = SemiLocalMask(local=9, num_context=2)
    monkeypatch.setattr(selfcheck, "_CASES", (selfcheck._Case(mask), selfcheck._Case(mask, 20)))
    monkeypatch.setattr(selfcheck, "_BIASED_LENGTHS", (0, 3, 40))
    monkeypatch.setattr(selfcheck, "_SIZES", (16,))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_passes_here(dtype: torch.dtype, biased: bool) -> None:
    selfcheck.check_attention(DEVICE, dtype, 16, 24, biased=biased)


def test_names_versions_when_a_kernel_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (portable, hopper):
        monkeypatch.setattr(module, "forward", lambda *x, right=module.forward, **y: right(*x, **y) * 1.1)
    for biased in (False, True):
        with pytest.raises(selfcheck.KernelMismatchError, match=r"output of .* heads of 16 and 24, .* Triton 3"):
            selfcheck.check_attention(DEVICE, torch.bfloat16, 16, 24, biased=biased)
    assert selfcheck.main() == 1
    assert capsys.readouterr().err.startswith("error: ")
