"""The Triton kernels against the float64 reference: a few small cases in the interpreter, the whole matrix on a GPU."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attention_kernels import SemiLocalMask, hstu_attention
from attention_kernels.attention.hopper.launchers import takes
from attention_kernels.rows import is_hopper
from tests.attention_kernels.attention.cases import Case, check, random_inputs, run

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
AWKWARD = (0, 1, 2, 63, 64, 65, 100, 127, 129, 1000)
WINDOWS = (0, 1, 17, 64, 256, 2000)
COUNTS = (0, 1, 3, 100)
SIZES = (32, 64, 96, 128, 256)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN (or absurd integers), so that whatever is read before it is written shows."""
    empty = torch.empty

    def poisoned(*arguments: Any, **options: Any) -> torch.Tensor:
        x = empty(*arguments, **options)
        return x.fill_(torch.nan if x.is_floating_point() else 2**30 if x.dtype == torch.int32 else 1)

    monkeypatch.setattr(torch, "empty", poisoned)


# Small enough for the interpreter, each with one feature of the mask at a boundary of tiles.
SMALL = {
    "full": Case(mask=SemiLocalMask(), histories=(None, 0, 1, 65, 129)),
    "full, context and targets": Case(mask=SemiLocalMask(num_context=3), histories=(0, 63, 70), targets=(1, 3, 17)),
    "local": Case(mask=SemiLocalMask(local=17), histories=(1, 64, 100)),
    "local 0": Case(mask=SemiLocalMask(local=0), histories=(2, 65)),
    "semi-local": Case(mask=SemiLocalMask(local=17, global_rows=20), histories=(None, 2, 19, 127)),
    "global rows beyond the length": Case(mask=SemiLocalMask(local=5, global_rows=2000), histories=(0, 70)),
    "columns": Case(mask=SemiLocalMask(local=20, global_columns=7), histories=(3, 150)),
    "everything": Case(
        mask=SemiLocalMask(local=40, global_rows=30, global_columns=5, num_context=3),
        histories=(0, 64, 130),
        targets=(2, 0, 9),
        heads=2,
    ),
    # Context, band and global rows of one key tile begin within a block of each other.
    "segments that nearly touch": Case(
        mask=SemiLocalMask(local=64, global_rows=64, global_columns=1, num_context=1), histories=(129,), targets=(1,)
    ),
    "split": Case(mask=SemiLocalMask(local=64, global_rows=60, num_context=2), histories=(1090,)),
    "K and V differ, padded": Case(mask=SemiLocalMask(local=9), histories=(30,), key_size=24, value_size=40),
    "strided, unaligned": Case(
        mask=SemiLocalMask(local=9, global_rows=4), histories=(30, 40), key_size=17, value_size=33, strided=True
    ),
    "wide float32": Case(mask=SemiLocalMask(local=9, global_rows=4), histories=(30, 40), key_size=255, value_size=130),
    "strided, aligned": Case(mask=SemiLocalMask(num_context=1), histories=(30, 40), heads=2, strided=True),
    "bfloat16": Case(mask=SemiLocalMask(local=17, global_rows=20), histories=(80, 30), dtype=torch.bfloat16),
    "scaled, local": Case(
        mask=SemiLocalMask(local=17, global_rows=20), histories=(1, 0, 100), heads=2, strided=True, projection="scaled"
    ),
    "scaled, full": Case(mask=SemiLocalMask(), histories=(65, None, 30), projection="scaled"),
    "scaled, split": Case(
        mask=SemiLocalMask(local=64, global_rows=60, num_context=2), histories=(1090,), projection="scaled"
    ),
    "sums": Case(
        mask=SemiLocalMask(local=17), histories=(70, 30), heads=2, key_size=24, value_size=40, projection="linear"
    ),
    "float16": Case(mask=SemiLocalMask(num_context=2), histories=(80, 30), dtype=torch.float16),
}


@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL.keys())
def test_equals_reference(case: Case) -> None:
    check(case, DEVICE)


def cases(max_history: int, max_sequences: int, sizes: tuple[int, ...], dtypes: list[torch.dtype]) -> Any:
    """Any mask over any lengths."""
    window = st.sampled_from([x for x in WINDOWS if x <= 2 * max_history or x == 2000]) | st.integers(0, max_history)
    count = st.sampled_from([0, 0, 1, 3, min(100, max_history)])
    masks = st.builds(SemiLocalMask, num_context=count) | st.builds(
        SemiLocalMask, local=window, global_rows=window, global_columns=count, num_context=count
    )
    awkward = st.sampled_from([x for x in AWKWARD if x <= max_history])
    history = st.none() | awkward | st.integers(0, max_history)
    sequences = st.lists(st.tuples(history, count), max_size=max_sequences)

    def build(mask: SemiLocalMask, pairs: list[tuple[int | None, int]], with_targets: bool, **fields: Any) -> Case:
        histories = tuple(h for h, _ in pairs)
        targets = tuple(0 if h is None else t for h, t in pairs) if with_targets else None
        return Case(mask=mask, histories=histories, targets=targets, **fields)

    return st.builds(
        build,
        masks,
        sequences,
        st.booleans(),
        heads=st.integers(1, 3),
        key_size=st.sampled_from(sizes),
        value_size=st.sampled_from(sizes),
        dtype=st.sampled_from(dtypes),
        strided=st.booleans(),
        # On a GPU each kind is compiled; there the whole matrix covers them.
        projection=st.sampled_from([None] if CUDA else [None, None, "linear", "scaled"]),
    )


@settings(
    max_examples=120 if CUDA else 6,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    case=cases(1000, 6, (32, 96), [torch.float32, torch.bfloat16]) if CUDA else cases(100, 2, (16, 24), [torch.float32])
)
def test_any_case_equals_reference(case: Case) -> None:
    check(case, DEVICE)


def check_repeats(case: Case) -> None:
    first, second = (run(case, DEVICE, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_repeats_bit_for_bit() -> None:
    check_repeats(replace(SMALL["split"] if CUDA else SMALL["everything"], projection="scaled"))


@pytest.mark.parametrize("mask", [SemiLocalMask(num_context=2), SemiLocalMask(local=2, global_rows=1)])
def test_empty_batch_and_empty_sequences(mask: SemiLocalMask) -> None:
    for offsets in ([0], [0, 0], [0, 0, 0]):
        x = torch.zeros(0, 2, 32, device=DEVICE, requires_grad=True)
        out = hstu_attention(x, x, x, torch.tensor(offsets, device=DEVICE), mask, backend="triton")
        out.sum().backward()
        assert out.shape == (0, 2, 32) and x.grad is not None and x.grad.shape == x.shape


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs an NVIDIA GPU; the small cases run in the interpreter")
class TestWholeMatrix:
    """Every value of every list; pairs of windows in full, the other fields cycled through all their combinations."""

    # Heads of 32 are the portable kernels', in 16 bits the larger ones those for Hopper, where the GPU is one.
    @pytest.mark.parametrize(
        ("dtype", "size"), [(torch.float32, 32), (torch.bfloat16, 32), (torch.bfloat16, 128), (torch.bfloat16, 256)]
    )
    @pytest.mark.parametrize(("local", "rows"), [(None, 0), *itertools.product(WINDOWS, WINDOWS)])
    def test_masks(self, local: int | None, rows: int, dtype: torch.dtype, size: int) -> None:
        if local is None:
            combinations = list(itertools.product((0,), COUNTS, COUNTS))
        else:
            index = WINDOWS.index(local) * len(WINDOWS) + WINDOWS.index(rows)
            every = list(itertools.product(COUNTS, COUNTS, COUNTS))
            # 64 combinations over 36 pairs of windows: two each cover all of them.
            combinations = [every[index], every[(index + 36) % 64]]
        for columns, context, targets in combinations:
            mask = SemiLocalMask(local=local, global_rows=rows, global_columns=columns, num_context=context)
            number = (targets,) * (len(AWKWARD) + 1) if targets else None
            sizes = {"key_size": size, "value_size": size}
            check(Case(mask=mask, histories=(*AWKWARD, None), targets=number, heads=2, dtype=dtype, **sizes), DEVICE)

    @pytest.mark.parametrize("size", [64, 128, 256])
    @pytest.mark.parametrize(
        "mask", [SemiLocalMask(num_context=2), SemiLocalMask(local=64, global_rows=100, num_context=2)]
    )
    def test_long_sequences(self, mask: SemiLocalMask, size: int) -> None:
        """Rows that see everything are split over keys; the same bits every time."""
        case = Case(
            mask=mask,
            histories=(4100, 700),
            targets=(3, 0),
            heads=2,
            key_size=size,
            value_size=size,
            dtype=torch.bfloat16,
            projection="scaled",
        )
        inputs = random_inputs(case, DEVICE)
        assert takes(*inputs) == is_hopper(inputs[0].device)
        check(case, DEVICE)
        check_repeats(case)

    @pytest.mark.parametrize(("key_size", "value_size"), list(itertools.product(SIZES, SIZES)))
    @pytest.mark.parametrize("local", [None, 64])
    def test_sizes(self, key_size: int, value_size: int, local: int | None) -> None:
        mask = SemiLocalMask(local=local, global_rows=17 if local else 0, num_context=3)
        case = Case(
            mask=mask,
            histories=AWKWARD,
            targets=(3,) * len(AWKWARD),
            key_size=key_size,
            value_size=value_size,
            dtype=torch.bfloat16,
            strided=True,
        )
        check(case, DEVICE)
        check(replace(case, projection="scaled"), DEVICE)

    @pytest.mark.parametrize("size", [*SIZES, 255])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
    def test_dtypes(self, size: int, dtype: torch.dtype) -> None:
        """With rows that the TMA reads, and of 255 that it does not."""
        mask = SemiLocalMask(local=64, global_rows=17, num_context=3)
        case = Case(mask=mask, histories=AWKWARD, key_size=size, value_size=size, dtype=dtype)
        check(case, DEVICE)
        check(replace(case, projection="scaled"), DEVICE)

    def test_more_than_2_31_elements(self) -> None:
        """The last sequence of a batch whose tensors pass 2**31 elements, as slices of a fused buffer that does."""
        total, heads, size = 2**22 + 1000, 4, 128
        buffer = torch.zeros(total, 4 * heads * size, device=DEVICE, dtype=torch.bfloat16)
        buffer[-1000:].normal_()
        q, k, v, _ = (x.unflatten(1, (heads, size)) for x in buffer.chunk(4, dim=1))
        lengths = [4096] * (2**22 // 4096) + [1000]
        offsets = torch.tensor([0, *itertools.accumulate(lengths)], device=DEVICE)
        for mask in (SemiLocalMask(), SemiLocalMask(local=64, global_rows=64)):
            out = hstu_attention(q, k, v, offsets, mask)
            last = hstu_attention(q[-1000:], k[-1000:], v[-1000:], torch.tensor([0, 1000], device=DEVICE), mask)
            assert last.abs().max() > 0
            torch.testing.assert_close(out[-1000:], last, rtol=1e-2, atol=1e-5)
