"""The fused layer kernels against `layer_reference` in float64, forward and all gradients.

Without a GPU the kernels run in Triton's interpreter.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attention_kernels.layer import operations
from attention_kernels.layer import reference as layer_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 1e-6
ROW_COUNTS = (0, 1, 63, 100)
WIDTHS = (16, 40, 96) if DEVICE.type == "cpu" else (16, 40, 512, 1000, 1024)
# Allowed error against float64: absolute for values of size one; bfloat16's is its rounding step (2 ** -8) times three.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.2e-2}


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    # Sums over rows grow with their number: compare on the scale of the expected values.
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(actual.double() / scale, expected / scale, rtol=0, atol=TOLERANCE[dtype])


def gradients(function: Callable[..., Tensor], dout: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Float64 gradients of the reference."""
    leaves = [x.double().detach().requires_grad_() for x in inputs]
    return list(torch.autograd.grad(function(*leaves), leaves, dout.double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", ROW_COUNTS)
def test_layer_norm_equals_reference(rows: int, width: int, dtype: torch.dtype) -> None:
    x, dout, residual = (3 + random(rows, width, dtype=dtype, seed=seed) for seed in range(3))
    weight, bias = random(width, dtype=torch.float32, seed=3), random(width, dtype=torch.float32, seed=4)
    normed, mean, rstd = operations.layer_norm_forward(x, weight, bias, EPS, backend="triton")
    assert_near(normed, layer_reference.layer_norm(x.double(), weight, bias, EPS), dtype)
    found = operations.layer_norm_backward(
        dout, x, weight, bias, mean, rstd, EPS, residual_TD=residual, backend="triton"
    )
    expected = gradients(lambda *a: layer_reference.layer_norm(*a, EPS), dout, x, weight, bias)
    expected[0] += residual
    for actual, wanted in zip(found, expected, strict=True):
        assert_near(actual, wanted, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", ROW_COUNTS)
def test_silu_equals_reference(rows: int, dtype: torch.dtype) -> None:
    """On columns of a wider buffer whose other columns stay as they are."""
    x = random(rows, 96, dtype=dtype)
    buffer = torch.full((rows, 128), float("nan"), dtype=dtype, device=DEVICE)
    buffer[:, 24:120] = x
    operations.silu_(buffer[:, 24:120], backend="triton")
    assert buffer[:, :24].isnan().all() and buffer[:, 120:].isnan().all()
    assert_near(buffer[:, 24:120], layer_reference.silu(x.double()), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dropout", "seed"), [(0.0, 0), (0.3, 1), (0.3, 12345)])
@pytest.mark.parametrize("concat", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("rows", (0, 1, 70))
def test_gated_norm_equals_reference(
    rows: int, groups: int, concat: bool, dropout: float, seed: int, dtype: torch.dtype
) -> None:
    width, x_width = 80, 48
    attention, u = (random(rows, width, dtype=dtype, seed=seed) for seed in range(2))
    weight, bias = random(width, dtype=torch.float32, seed=3), random(width, dtype=torch.float32, seed=4)
    x = random(rows, x_width, dtype=dtype, seed=5)
    residual = random(rows, x_width, dtype=dtype, seed=6)
    options = {"num_groups": groups, "dropout": dropout, "seed": torch.tensor([seed], device=DEVICE)}

    def function(a: Tensor, u: Tensor, w: Tensor, b: Tensor, x: Tensor) -> Tensor:
        return layer_reference.gated_norm(a, u, w, b, EPS, x_TD=x if concat else None, **options) + 0 * x.sum()

    x_or_none = x if concat else None
    out = operations.gated_norm_forward(attention, u, weight, bias, EPS, x_TD=x_or_none, backend="triton", **options)
    assert_near(out, function(*(a.double() for a in (attention, u, weight, bias, x))), dtype)
    dout = random(*out.shape, dtype=dtype, seed=7)
    # A slice of a wider buffer whose other columns must stay as they are.
    buffer = torch.full((rows, width + 32), float("nan"), dtype=dtype, device=DEVICE)
    dattention, dx, gated, dweight, dbias, du_sum = operations.gated_norm_backward(
        dout,
        attention,
        u,
        weight,
        bias,
        EPS,
        x_TD=x_or_none,
        residual_TD=residual,
        du=buffer[:, 16 : 16 + width],
        backend="triton",
        **options,
    )
    expected = gradients(function, dout, attention, u, weight, bias, x)
    expected[4] = expected[4] + residual
    expected.append(expected[1].sum(0))
    assert torch.equal(gated, out)
    assert buffer[:, :16].isnan().all() and buffer[:, 16 + width :].isnan().all()
    found = (dattention, buffer[:, 16 : 16 + width], dweight, dbias, dx, du_sum)
    for actual, wanted in zip(found, expected, strict=True):
        assert_near(actual, wanted, dtype)


@pytest.mark.parametrize("concat", [False, True])
def test_reference_backend_gives_the_same_gradients(concat: bool) -> None:
    rows, width = 20, 32
    a, u, x, residual = (random(rows, width, dtype=torch.float32, seed=seed) for seed in range(4))
    weight, bias = random(width, dtype=torch.float32, seed=3), random(width, dtype=torch.float32, seed=4)
    dout = random(rows, 3 * width if concat else width, dtype=torch.float32, seed=8)
    results = []
    for backend in ("triton", "reference"):
        du = torch.empty_like(u)
        results.append(
            [
                *operations.gated_norm_backward(
                    dout,
                    a,
                    u,
                    weight,
                    bias,
                    EPS,
                    x_TD=x if concat else None,
                    residual_TD=residual,
                    du=du,
                    dropout=0.25,
                    seed=torch.tensor([3], device=DEVICE),
                    backend=backend,
                ),
                du,
            ]
        )
    for triton_result, reference_result in zip(*results, strict=True):
        assert_near(triton_result, reference_result.double(), torch.float32)


def test_dropout_keeps_the_right_share_and_scales_it() -> None:
    ones = torch.ones(200, 64, device=DEVICE)
    kept = layer_reference.keep_mask(ones.shape, 0.25, torch.tensor([7], device=DEVICE), DEVICE)
    assert float(kept.double().mean()) == pytest.approx(0.75, abs=0.015)
    assert not torch.equal(kept, layer_reference.keep_mask(ones.shape, 0.25, torch.tensor([8], device=DEVICE), DEVICE))


def test_wrong_shapes_are_refused_with_the_arguments_name() -> None:
    x = torch.zeros(4, 8, device=DEVICE)
    with pytest.raises(ValueError, match="weight is"):
        operations.layer_norm_forward(x, torch.ones(7), torch.ones(8), EPS, backend="reference")
    with pytest.raises(ValueError, match="x_TD is"):
        operations.layer_norm_forward(x.T, torch.ones(4), torch.ones(4), EPS, backend="reference")
    with pytest.raises(ValueError, match="num_groups=3"):
        operations.gated_norm_forward(x, x, torch.ones(8), torch.ones(8), EPS, num_groups=3, backend="reference")
    with pytest.raises(ValueError, match="u_TW is"):
        operations.gated_norm_forward(x, x[:, :4], torch.ones(8), torch.ones(8), EPS, backend="reference")
    with pytest.raises(ValueError, match="dropout=1"):
        operations.gated_norm_forward(x, x, torch.ones(8), torch.ones(8), EPS, dropout=1.0, backend="reference")
    with pytest.raises(ValueError, match="seed is on meta"):
        seed = torch.zeros(1, dtype=torch.long, device="meta")
        operations.gated_norm_forward(x, x, *[torch.ones(8)] * 2, EPS, dropout=0.5, seed=seed, backend="reference")
    with pytest.raises(ValueError, match="x is"):
        operations.silu_(x.T, backend="reference")
    norm = (torch.ones(8), torch.ones(8))
    turned = torch.zeros(8, 4, device=DEVICE).T
    with pytest.raises(ValueError, match="dnormed_TD is"):
        operations.layer_norm_backward(
            turned, x, *norm, torch.zeros(4), torch.zeros(4), EPS, residual_TD=x, backend="reference"
        )
    with pytest.raises(ValueError, match="dout is"):
        operations.gated_norm_backward(turned, x, x, *norm, EPS, residual_TD=x, du=x.clone(), backend="reference")
