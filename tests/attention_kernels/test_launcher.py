"""Which launches go through Triton's binding, and what the compiled kernel receives.  GPU tests launch for real."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attention_kernels import launcher
from attention_kernels.attention.hopper.launchers import RingConfig
from attention_kernels.launcher import Blocks, compiling_together, launch

BUFFER = torch.zeros(1024, dtype=torch.bfloat16)


class Compiled:
    """What `launch` needs of a compiled kernel: Triton's launcher takes a grid and six values before the arguments."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, calls: list[tuple[Any, ...]]) -> None:
        self.calls = calls

    def run(self, x: int, y: int, z: int, stream: int, *rest: Any) -> None:
        assert (stream, *rest[:5]) == (7, "function", "metadata", None, None, None)
        self.calls.append(((x, y, z), *rest[5:]))


class Kernel:
    """What `launch` needs of a kernel with arguments x, n and a compile-time SIZE."""

    arg_names = ("x", "n", "SIZE")

    def __init__(self) -> None:
        self.bound: list[tuple[Any, ...]] = []
        self.direct: list[tuple[Any, ...]] = []
        self.only_compiled: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled]:
        def run(*arguments: Any, **constants: Any) -> Compiled:
            self.bound.append((grid, *arguments, constants))
            return Compiled(self.direct)

        return run

    def warmup(self, *arguments: Any, grid: tuple[int, ...], **constants: Any) -> Compiled:
        self.only_compiled.append((grid, *arguments, constants))
        return Compiled([])


@pytest.fixture(autouse=True)
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launcher, "driver", SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda _: 7)))


def test_same_kinds_are_bound_once_and_then_launched_directly() -> None:
    kernel = Kernel()
    aligned, same = BUFFER, BUFFER[8:]
    launch(kernel, (3,), aligned, 32, SIZE=16, num_warps=4)
    launch(kernel, (5, 2), same, 48, SIZE=16, num_warps=4)
    assert kernel.bound == [((3,), aligned, 32, {"SIZE": 16, "num_warps": 4})]
    [(grid, x, n, size)] = kernel.direct
    assert grid == (5, 2, 1) and x is same and n == 48 and size is None


@pytest.mark.parametrize(
    ("x", "n", "constants"),
    [
        (BUFFER[1:], 32, {"SIZE": 16}),
        (BUFFER.half(), 32, {"SIZE": 16}),
        (None, 32, {"SIZE": 16}),
        (BUFFER, 1, {"SIZE": 16}),
        (BUFFER, 33, {"SIZE": 16}),
        (BUFFER, 2**31, {"SIZE": 16}),
        (BUFFER, 32.0, {"SIZE": 16}),
        (BUFFER, 32, {"SIZE": 32}),
        (BUFFER, 32, {"SIZE": 16, "num_warps": 8}),
        (Blocks(BUFFER.view(64, 16), (16, 16)), 32, {"SIZE": 16}),
    ],
)
def test_what_triton_compiles_anew_is_bound_anew(x: Any, n: Any, constants: dict[str, int]) -> None:
    kernel = Kernel()
    launch(kernel, (1,), BUFFER, 32, SIZE=16)
    for _ in range(2):
        launch(kernel, (1,), x, n, **constants)
    assert len(kernel.bound) == 2 and len(kernel.direct) == 1


def test_blocks_are_told_apart_by_their_shape() -> None:
    kernel, matrix = Kernel(), BUFFER.view(64, 16)
    for rows in (16, 32, 16):
        launch(kernel, (1,), Blocks(matrix, (rows, 16)), 32, SIZE=16)
    assert [call[1].block_shape for call in kernel.bound] == [[16, 16], [32, 16]]
    assert [call[1].block_shape for call in kernel.direct] == [(16, 16)]


def test_what_is_compiled_together_is_compiled_once_a_kind_and_not_run() -> None:
    kernel, other = Kernel(), Kernel()
    launch(other, (1,), BUFFER, 32, SIZE=16)
    with compiling_together():
        for n in (32, 48, 33):
            launch(kernel, (3,), BUFFER, n, SIZE=16)
        launch(other, (1,), BUFFER, 32, SIZE=16)
    assert [(n, constants) for _, _, n, constants in kernel.only_compiled] == [(32, {"SIZE": 16}), (33, {"SIZE": 16})]
    assert not kernel.bound and not kernel.direct and not other.only_compiled and not other.direct
    launch(kernel, (3,), BUFFER, 32, SIZE=16)
    assert len(kernel.bound) == 1 and len(kernel.only_compiled) == 2


def test_kernels_run_again_after_a_pass_that_failed() -> None:
    kernel = Kernel()
    with pytest.raises(ZeroDivisionError), compiling_together():
        launch(kernel, (1,), BUFFER, 1 // 0, SIZE=16)
    launch(kernel, (1,), BUFFER, 32, SIZE=16)
    assert len(kernel.bound) == 1


def test_a_ring_of_one_stage_is_refused() -> None:
    """A kernel with one would hang."""
    with pytest.raises(ValueError, match="at least 2"):
        RingConfig(block=64, held_stages=1, stages=1)
