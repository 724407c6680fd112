"""Arguments are checked by name, the operator passes through torch's compilers, both backends keep the contract."""

import logging
from typing import Any

import pytest
import torch

from attention_kernels import SemiLocalMask, attention_backward, attention_forward, hstu_attention, make_plan
from attention_kernels.attention import interface

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
MASK = SemiLocalMask(local=4, global_rows=2, num_context=1)


def arguments(**changes: Any) -> dict[str, Any]:
    q, k, v = (torch.randn(10, 2, 16) for _ in range(3))
    return {"q_THK": q, "k_THK": k, "v_THV": v, "offsets": torch.tensor([0, 4, 10]), "mask": MASK, **changes}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"q_THK": torch.randn(10, 16)}, "q_THK"),
        ({"k_THK": torch.randn(10, 2, 8)}, "k_THK"),
        ({"v_THV": torch.randn(9, 2, 16)}, "v_THV"),
        ({"v_THV": torch.randn(10, 2, 16).half()}, "v_THV"),
        ({"q_THK": torch.randint(0, 2, (10, 2, 16))}, "q_THK"),
        ({"v_THV": torch.randn(10, 2, 257)}, "v_THV"),
        ({"v_THV": torch.randn(10, 16, 2).transpose(1, 2)}, "v_THV"),
        ({"k_THK": torch.randn(10, 2, 16, device="meta")}, "k_THK"),
        ({"offsets": torch.tensor([[0, 10]])}, "offsets"),
        ({"offsets": torch.tensor([0.0, 10.0])}, "offsets"),
        ({"offsets": torch.tensor([0])}, "offsets"),
        ({"offsets": torch.tensor([0, 4, 9])}, "offsets"),
        ({"offsets": torch.tensor([1, 4, 10])}, "offsets"),
        ({"offsets": torch.tensor([0, 12, 10])}, "offsets"),
        ({"offsets": torch.tensor([], dtype=torch.int64)}, "offsets"),
        ({"num_targets": torch.tensor([1])}, "num_targets"),
        ({"num_targets": torch.tensor([5, 0])}, r"num_targets\[0\]"),
        ({"num_targets": torch.tensor([4, 0])}, "offsets"),
        ({"num_targets": torch.tensor([-1, 0])}, r"num_targets\[0\]"),
        ({"mask": "causal"}, "mask"),
        ({"max_len": 0}, "max_len"),
        ({"max_len": 5}, "max_len"),
        ({"scale": float("nan")}, "scale"),
        ({"scale": "1"}, "scale"),
        ({"backend": "cuda"}, "backend"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        hstu_attention(**arguments(**changes))


def test_wrong_gradient_buffers_are_named() -> None:
    given = arguments()
    q, k, v = given["q_THK"], given["k_THK"], given["v_THV"]
    plan = make_plan(given["offsets"], MASK)
    with pytest.raises(ValueError, match="dout_RHV"):
        attention_backward(torch.randn(10, 2, 8), q, k, v, plan)
    with pytest.raises(ValueError, match=r"out\[2\]"):
        attention_backward(v, q, k, v, plan, out=(q.clone(), k.clone(), torch.empty(10, 2, 8)))


def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface, "INTERPRETED", False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        hstu_attention(**arguments(backend="triton"))


def test_indices_may_be_strided_and_gradients_expanded() -> None:
    q, k, v = (torch.randn(20, 2, 16, device=DEVICE) for _ in range(3))
    offsets, targets = (torch.tensor(x, device=DEVICE) for x in ([0, 8, 20], [3, 3]))
    wide_offsets, wide_targets = torch.stack([offsets, offsets + 7], 1)[:, 0], targets[:1].expand(2)
    dout = torch.randn(2, 16, device=DEVICE).expand(20, 2, 16)
    mask = SemiLocalMask(num_context=1)
    strided, plain = (
        make_plan(o, mask, num_targets=t, max_len=16, backend=backend)
        for o, t, backend in ((wide_offsets, wide_targets, "triton"), (offsets, targets, "reference"))
    )
    for function, first in ((attention_forward, ()), (attention_backward, (dout,))):
        found, wanted = (function(*first, q, k, v, plan) for plan in (strided, plain))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_second_derivatives_are_refused(backend: Any) -> None:
    q, k, v = (torch.randn(10, 2, 16, device=DEVICE, requires_grad=True) for _ in range(3))
    out = hstu_attention(q, k, v, torch.tensor([0, 10], device=DEVICE), MASK, backend=backend)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(out.sum(), q, create_graph=True)


def test_choice_of_backend_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    interface._log_backend.cache_clear()
    with caplog.at_level(logging.INFO, logger="attention_kernels.attention.interface"):
        for _ in range(2):
            hstu_attention(**arguments())
    assert caplog.messages == ["attention backend on cpu tensors: reference (chosen by device)"]


@pytest.mark.parametrize("with_targets", [False, True])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    # The interpreter would take minutes.
    [("reference", torch.float32), ("reference", torch.float64), *([("triton", torch.float32)] if CUDA else [])],
)
def test_operator_is_registered_properly(backend: Any, dtype: torch.dtype, with_targets: bool) -> None:
    targets = torch.tensor([1, 0], dtype=torch.int32, device=DEVICE) if with_targets else None
    dout, q, k, v = (torch.randn(10, 2, 16, dtype=dtype, device=DEVICE) for _ in range(4))
    fields = (torch.tensor([0, 4, 10], device=DEVICE), targets, 4, 2, 0, 1, 0.25, 16, backend)
    plain = (dout, q, k, v)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.longview.hstu_attention_forward, (*leaves, *fields))
    torch.library.opcheck(torch.ops.longview.hstu_attention_backward, (*plain, *fields))


def test_compiles_without_a_graph_break() -> None:
    given = arguments()
    inputs = [given[name].requires_grad_() for name in ("q_THK", "k_THK", "v_THV")]

    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return hstu_attention(q * 2, k, v, offsets, MASK, max_len=16) + 1

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected, actual = layer(*inputs, given["offsets"]), compiled(*inputs, given["offsets"])
    torch.testing.assert_close(actual, expected)
    for a, b in zip(*(torch.autograd.grad(x.sum(), inputs) for x in (actual, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_exports_with_any_number_of_positions() -> None:
    class Layer(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
            return hstu_attention(q, k, v, offsets, MASK, max_len=16)

    given = arguments()
    positions, bounds = torch.export.Dim("positions", min=2), torch.export.Dim("bounds", min=2)
    shapes = ({0: positions}, {0: positions}, {0: positions}, {0: bounds})
    inputs = (given["q_THK"], given["k_THK"], given["v_THV"], given["offsets"])
    exported = torch.export.export(Layer(), inputs, dynamic_shapes=shapes).module()
    longer = (*(torch.randn(13, 2, 16) for _ in range(3)), torch.tensor([0, 5, 5, 13]))
    torch.testing.assert_close(exported(*longer), Layer()(*longer))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_candidates_do_not_see_each_other(backend: Any) -> None:
    """Exchanging two candidates exchanges their outputs and changes nothing else."""
    q, k, v = (torch.randn(12, 1, 16) for _ in range(3))
    offsets, targets = torch.tensor([0, 12]), torch.tensor([3])
    if torch.cuda.is_available() and backend == "triton":
        q, k, v, offsets, targets = (x.cuda() for x in (q, k, v, offsets, targets))
    order = [*range(9), 11, 10, 9]
    out, swapped = (
        hstu_attention(*(x[i] for x in (q, k, v)), offsets, MASK, targets, max_len=12, backend=backend)
        for i in (list(range(12)), order)
    )
    torch.testing.assert_close(swapped, out[order])
