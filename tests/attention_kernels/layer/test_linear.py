"""The layer's products with their epilogues, and FP8, against plain PyTorch.

bfloat16 runs on a GPU only: Triton's interpreter multiplies its bit patterns as integers.
"""

import logging

import pytest
import torch
from torch import Tensor

from attention_kernels.layer import linear, linear_kernel
from attention_kernels.layer import reference as layer_reference
from attention_kernels.layer.linear_kernel import Epilogue

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
DTYPES = (torch.bfloat16, torch.float16) if ON_GPU else (torch.float32, torch.float16)
# (rows, inner, columns), on a GPU also of more tiles than there are programs; float32 products would run in TF32 there
# and are left to PyTorch.
SHAPES = ((300, 512, 512), (129, 192, 256), (40000, 200, 264)) if ON_GPU else ((70, 64, 96), (1, 40, 32))


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def assert_as_good_as_torch(found: Tensor, torchs: Tensor, exact: Tensor) -> None:
    """At most twice the error of PyTorch in the same type, against float64."""
    budget = 2 * float((torchs.double() - exact).abs().max()) + 1e-5
    assert float((found.double() - exact).abs().max()) <= budget


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_residual_is_added_in_the_epilogue(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    M, K, N = shape
    a, b, residual = (
        random(M, K, seed=0, dtype=dtype),
        random(K, N, seed=1, dtype=dtype),
        random(M, N, seed=2, dtype=dtype),
    )
    found = linear.matmul_residual(a, b, residual, backend="triton")
    exact = residual.double() + a.double() @ b.double()
    assert_as_good_as_torch(found, torch.addmm(residual, a, b), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bias_and_silu_in_the_epilogue(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """With and without the slopes of SiLU; on columns of a wider weight, as the layer passes them."""
    M, K, N = shape
    a, bias = random(M, K, seed=0, dtype=dtype), random(N, seed=2)
    b = random(K, N + 32, seed=1, dtype=dtype)[:, 32:]
    buffer = torch.full((M, N + 32), torch.nan, dtype=dtype, device=DEVICE)
    slopes = buffer[:, 32:]
    out = linear.linear_silu(a, b, bias, slopes=slopes, dtype=dtype, backend="triton")
    assert buffer[:, :32].isnan().all()
    product = torch.addmm(bias.to(dtype), a, b)
    exact = a.double() @ b.double() + bias.double()
    assert_as_good_as_torch(out, layer_reference.silu(product), layer_reference.silu(exact))
    assert_as_good_as_torch(slopes, layer_reference.silu_slope(product), layer_reference.silu_slope(exact))
    assert torch.equal(linear.linear_silu(a, b, bias, dtype=dtype, backend="triton"), out)


@pytest.mark.parametrize("halves", [0, 1])
@pytest.mark.parametrize("resident", [0, 1])
def test_product_does_not_depend_on_how_it_is_cut(halves: int, resident: int) -> None:
    """Whole or half tiles stored, a program a tile or programs that walk over tiles: the same bits."""
    M, K, N = SHAPES[0]
    dtype = DTYPES[-1]
    a, b = random(M, K, seed=0, dtype=dtype), random(K, N, seed=1, dtype=dtype)
    bias, residual = random(N, seed=2), random(M, N, seed=3, dtype=dtype)
    plain = linear_kernel.tiles(fp8=False, silu=False)
    results = []
    for config in (plain, {**plain, "HALVES": halves, "RESIDENT": resident}):
        if not ON_GPU:
            config = {**config, "BLOCK_N": 32}
        out, slopes, sum_ = (torch.full((M, N), float("nan"), dtype=dtype, device=DEVICE) for _ in range(3))
        linear_kernel.product(a, b, out, Epilogue(slopes=slopes, silu=True, bias=bias), config=config)
        linear_kernel.product(a, b, sum_, Epilogue(residual=residual), config=config)
        results.append((out, slopes, sum_))
    assert not any(x.isnan().any() for x in results[1])
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("resident", [0, 2])
def test_batches_of_any_number_of_rows_run_one_compiled_product(resident: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launch is compiled for holds no number of rows: no batch of a new length stops for the compiler."""
    launched: list[dict[str, int]] = []
    monkeypatch.setattr(linear_kernel, "multiprocessors", lambda device: 100)
    monkeypatch.setattr(linear_kernel, "launch", lambda *arguments, **constants: launched.append(constants))
    config = {**linear_kernel.tiles(fp8=False, silu=True), "RESIDENT": resident}
    b = torch.ones(64, 96, dtype=torch.float16, device=DEVICE)
    for rows in (1, 33, 1000, 100_000):
        a, out = (torch.ones(1, width, dtype=torch.float16, device=DEVICE).expand(rows, -1) for width in (64, 96))
        linear_kernel.product(a, b, out, Epilogue(silu=True), config=config)
    assert len(launched) == 4 and all(constants == launched[0] for constants in launched)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_fp8_product_equals_its_dequantised_form(shape: tuple[int, int, int], with_residual: bool) -> None:
    M, K, N = (max(16, size // 16 * 16) for size in shape)
    if not ON_GPU and not with_residual:
        pytest.skip("a one-dimensional bias goes through torch._scaled_mm, which wants a GPU here")
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    rows, scale = linear.quantise_rows(random(M, K, seed=0), backend="triton")
    columns, column_scale = linear.quantise_columns(random(K, N, seed=1), backend="triton")
    extra = {"residual": random(M, N, seed=2, dtype=dtype)} if with_residual else {"bias": random(N, seed=2)}
    results = [
        linear.matmul_fp8(rows, scale, columns, column_scale, dtype=dtype, backend=backend, **extra)
        for backend in ("triton", "reference")
    ]
    torch.testing.assert_close(results[0], results[1], rtol=2e-2 if ON_GPU else 1e-4, atol=5e-2 if ON_GPU else 1e-4)


def assert_same_codes(found: Tensor, wanted: Tensor) -> None:
    """E4M3 values equal but for rounding to either side where float32 differs in its last bit: one step of 1/8."""
    codes = [found.float(), wanted.float()]
    if not ON_GPU:
        # The interpreter's conversion to E4M3 loses the carry into the exponent: leave out powers of two.
        carried = torch.frexp(codes[1])[0].abs() == 0.5
        codes = [code.masked_fill(carried, 0.0) for code in codes]
    torch.testing.assert_close(codes[0], codes[1], rtol=0.13, atol=1e-3)


@pytest.mark.parametrize("rows", [0, 1, 37])
def test_quantised_norms_equal_quantisation_after_the_norm(rows: int) -> None:
    width = 64
    x, u = random(rows, width, seed=0), random(rows, width, seed=1)
    weight, bias = random(width, seed=2), random(width, seed=3)
    options = {"num_groups": 1, "x_TD": None, "dropout": 0.0, "seed": None}
    for function, inputs in (
        (lambda backend: linear.layer_norm_fp8(x, weight, bias, 1e-6, backend=backend), 4),
        (lambda backend: linear.gated_norm_fp8(x, u, weight, bias, 1e-6, backend=backend, **options), 2),
    ):
        found, wanted = function("triton"), function("reference")
        assert len(found) == inputs
        assert_same_codes(found[0], wanted[0])
        for a, b in zip(found[1:], wanted[1:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("inner", "columns"), [(200, 37), (16, 16), (128, 64)])
def test_turned_columns_equal_rows_of_the_transposed_weight(inner: int, columns: int) -> None:
    weight = random(inner, columns + 3, seed=4)[:, :columns]
    found, wanted = (
        linear.quantise_columns(weight, backend="triton"),
        linear.quantise_columns(weight, backend="reference"),
    )
    assert found[0].shape == (columns, inner) and found[0].is_contiguous()
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-6, atol=0)
    assert_same_codes(found[0], wanted[0])


def test_quantisation_keeps_the_largest_value_and_rows_of_zeros() -> None:
    x = torch.tensor([[0.0, 0.0], [3.0, -6.0]], device=DEVICE).repeat(1, 8)
    for backend in ("triton", "reference"):
        rows, scale = linear.quantise_rows(x, backend=backend)
        torch.testing.assert_close(rows.float() * scale[:, None], x)


def test_what_is_not_fused_is_logged_once_with_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="attention_kernels.layer.linear")
    linear._log_unfused.cache_clear()
    x, vector = random(8, 32, seed=0, dtype=torch.float16), torch.ones(32, device=DEVICE)
    narrow = random(8, 12, seed=1, dtype=torch.float16)
    gate = {"num_groups": 1, "x_TD": None, "dropout": 0.0, "seed": None}
    for _ in range(2):
        linear.matmul_residual(x, x.new_ones(32, 32), x, backend="triton")
        linear.gated_norm_fp8(x, x, vector, vector, 1e-6, **gate, backend="triton")
        assert not caplog.records
    for _ in range(2):
        linear.matmul_residual(x[:0], x.new_ones(32, 12), narrow[:0], backend="triton")
        linear.matmul_residual(x, x.new_ones(32, 12), narrow, backend="triton")
        linear.linear_silu(x.float(), torch.ones(32, 32, device=DEVICE), vector, dtype=torch.float32, backend="triton")
        linear.gated_norm_fp8(
            x,
            x,
            vector,
            vector,
            1e-6,
            **gate | {"dropout": 0.1, "seed": torch.zeros(1, dtype=torch.long, device=DEVICE)},
            backend="triton",
        )
    assert [record.getMessage() for record in caplog.records] == [
        "the output product with its residual is not fused: a width whose rows do not start at multiples of 16 bytes",
        "the product of V, Q and K with SiLU is not fused: float32",
        "the gated norm with quantisation is not fused: its kernel takes neither groups nor concatenation nor dropout",
    ]
