"""Sums of gathered rows and their gradients against plain indexing in float64.

Without a GPU the kernels run in Triton's interpreter.
"""

import pytest
import torch
from torch import Tensor

from attention_kernels.layer.gather import Gather, gather_sum
from attention_kernels.layer.operations import LayerBackend

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def make_gathers(num: int, width: int, dtype: torch.dtype) -> list[Gather]:
    """Rows in a new order with gaps, twice the same; a table of which one row is gathered by most; an unused one."""
    generator = torch.Generator().manual_seed(num + width)

    def source(count: int, kind: torch.dtype) -> Tensor:
        x = torch.randn(count, width, generator=generator).to(DEVICE, kind)
        return x.requires_grad_()

    shuffled = torch.randperm(num + 3, generator=generator)[:num]
    shuffled[num // 2 : num // 2 + 5] = -1
    often = torch.randint(-1, 7, (num,), generator=generator)
    often[: num // 3 * 2] = 4
    shuffled, often = shuffled.to(DEVICE), often.to(DEVICE)
    return [
        Gather(source=source(num + 3, dtype), rows=shuffled, once=True),
        Gather(source=source(num + 3, dtype), rows=shuffled, once=True),
        Gather(source=source(8, torch.float32), rows=often, once=False),
        Gather(source=source(5, dtype), rows=torch.full_like(often, -1), once=False),
    ]


def expected(gathers: list[Gather], dout: Tensor) -> tuple[Tensor, list[Tensor]]:
    sources = [gather.source.detach().double().requires_grad_() for gather in gathers]
    out = torch.zeros(dout.shape, dtype=torch.float64, device=DEVICE)
    for source, gather in zip(sources, gathers, strict=True):
        keep = gather.rows >= 0
        out = out + torch.where(keep[:, None], source[gather.rows.clamp(min=0)], 0.0)
    return out.detach(), list(torch.autograd.grad(out, sources, dout.double()))


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num", "width"), [(0, 16), (1, 24), (70, 40), (1700, 136)])
def test_equals_plain_indexing(num: int, width: int, dtype: torch.dtype, backend: LayerBackend) -> None:
    gathers = make_gathers(num, width, dtype)
    dout = torch.randn(num, width, generator=torch.Generator().manual_seed(9)).to(DEVICE, dtype)
    out = gather_sum(gathers, dtype, backend=backend)
    assert out.dtype == dtype
    wanted, wanted_gradients = expected(gathers, dout)
    torch.testing.assert_close(out.double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    found = torch.autograd.grad(out, [gather.source for gather in gathers], dout)
    for gather, gradient, right in zip(gathers, found, wanted_gradients, strict=True):
        assert gradient.dtype == gather.source.dtype
        scale = max(1.0, float(right.abs().max())) if right.numel() else 1.0
        torch.testing.assert_close(gradient.double() / scale, right / scale, rtol=0, atol=TOLERANCE[dtype])


def test_gradients_are_the_same_bits_every_time() -> None:
    gathers = make_gathers(1700, 40, torch.float32)
    dout = torch.randn(1700, 40).to(DEVICE)
    runs = [
        torch.autograd.grad(gather_sum(gathers, torch.float32, backend="triton"), [x.source for x in gathers], dout)
        for _ in range(2)
    ]
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_wrong_shapes_are_refused() -> None:
    rows = torch.zeros(3, dtype=torch.int64)
    good = Gather(source=torch.zeros(2, 4), rows=rows, once=False)
    with pytest.raises(ValueError, match=r"a source \(2, 5\)"):
        gather_sum([good, Gather(source=torch.zeros(2, 5), rows=rows, once=False)], torch.float32)
    with pytest.raises(ValueError, match="6 gathers, expected 1 to 5"):
        gather_sum([good] * 6, torch.float32)
    with pytest.raises(ValueError, match="0 gathers"):
        gather_sum([], torch.float32)
    with pytest.raises(ValueError, match=r"rows are torch\.int32"):
        gather_sum([Gather(source=torch.zeros(2, 4), rows=rows.int(), once=False)], torch.float32)


def test_views_of_one_index_are_different_rows() -> None:
    index = torch.arange(5, device=DEVICE)
    sources = [torch.zeros(5, 16, device=DEVICE, requires_grad=True) for _ in range(2)]
    gathers = [Gather(source=x, rows=rows, once=True) for x, rows in zip(sources, (index[:3], index[::2]), strict=True)]
    gather_sum(gathers, torch.float32).sum().backward()
    assert [x.grad[:, 0].tolist() for x in sources if x.grad is not None] == [[1, 1, 1, 0, 0], [1, 0, 1, 0, 1]]
