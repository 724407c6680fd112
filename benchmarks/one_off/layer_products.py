"""Times the products and row kernels of an HSTU layer one by one, so that tiles and fusions are chosen by measurement.

Run on a GPU: python -m benchmarks.one_off.layer_products [--json FILE]
"""

import argparse
import concurrent.futures
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

from attention_kernels.layer import fp8, gated_norm, hopper_linear, layer_norm, linear, linear_kernel, silu
from attention_kernels.layer.linear_kernel import Epilogue
from attention_kernels.rows import is_hopper

TOKENS = 131072
KEYS = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "HALVES", "RESIDENT", "num_warps", "num_stages")
CONFIGS = [
    dict(zip(KEYS, values, strict=True))
    for values in [
        (128, 128, 64, 0, 0, 8, 3),
        (128, 128, 64, 0, 0, 4, 3),
        (128, 128, 64, 1, 2, 8, 3),
        (128, 128, 64, 1, 2, 4, 3),
        (128, 256, 64, 1, 1, 8, 3),
        (128, 256, 64, 1, 1, 8, 4),
        (256, 128, 64, 1, 1, 8, 3),
        (128, 256, 64, 0, 0, 8, 3),
    ]
]


def time_ms(function: Callable[[], Any]) -> float:
    """Median milliseconds; -1 where the kernel does not compile or does not fit."""
    try:
        function()
        return float(triton.testing.do_bench(function, warmup=15, rep=60, return_mode="median"))
    except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError):
        return -1.0


def products(dim: int) -> dict[str, Callable[[], Any]]:
    """The products of a layer of width `dim` (gate and keys as wide), with what each is compared with."""
    bf16: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    x, residual = torch.randn(TOKENS, dim, **bf16), torch.randn(TOKENS, dim, **bf16)
    w1, w2 = torch.randn(dim, 4 * dim, **bf16) / dim**0.5, torch.randn(dim, dim, **bf16) / dim**0.5
    bias = torch.randn(4 * dim, device="cuda")
    wu, wvqk, bu, bvqk = w1[:, :dim], w1[:, dim:], bias[:dim], bias[dim:]
    vqk, slopes, out = (torch.empty(TOKENS, n * dim, **bf16) for n in (3, 3, 1))
    duvqk = torch.randn(TOKENS, 4 * dim, **bf16)
    runs: dict[str, Callable[[], Any]] = {
        "u cublas": lambda: torch.addmm(bu.to(torch.bfloat16), x, wu),
        "vqk cublas": lambda: torch.addmm(bvqk.to(torch.bfloat16), x, wvqk),
        "vqk silu kernel, in place": lambda: silu.forward_(slopes),
        "output addmm": lambda: torch.addmm(residual, x, w2),
        "output cublas without residual": lambda: x @ w2,
        "gradient of the gate": lambda: residual @ w2.t(),
        "gradient of the normed input": lambda: duvqk @ w1.t(),
        "gradient of the uvqk weight": lambda: x.t() @ duvqk,
        "gradient of the output weight": lambda: x.t() @ residual,
    }
    x8, w18, w28 = (linear.quantise_rows(t, backend="triton") for t in (x, w1.t(), w2.t()))
    u8, vqk8 = ((w18[0][part], w18[1][part]) for part in (slice(0, dim), slice(dim, None)))
    bf16_result: dict[str, Any] = {"dtype": torch.bfloat16, "backend": "triton"}
    runs["weight to fp8"] = lambda: linear.quantise_columns(w1.float(), backend="triton")
    runs["u fp8 scaled_mm"] = lambda: linear.matmul_fp8(*x8, *u8, bias=bu, **bf16_result)
    runs["vqk fp8 scaled_mm"] = lambda: linear.matmul_fp8(*x8, *vqk8, bias=bvqk, **bf16_result)
    fused: dict[str, tuple[Any, ...]] = {
        "vqk fused": (x, wvqk, vqk, Epilogue(silu=True, bias=bvqk)),
        "vqk fused keeping slopes": (x, wvqk, vqk, Epilogue(silu=True, bias=bvqk, slopes=slopes)),
        "output residual kernel": (x, w2, out, Epilogue(residual=residual)),
        "vqk fp8 fused": (
            *(x8[0], vqk8[0], vqk),
            Epilogue(silu=True, bias=bvqk, row_scale=x8[1], column_scale=vqk8[1]),
        ),
        "output fp8 residual kernel": (
            *(x8[0], w28[0], out),
            Epilogue(residual=residual, row_scale=x8[1], column_scale=w28[1]),
        ),
    }
    for what, arguments in fused.items():
        if is_hopper(x.device):
            runs[f"{what} hopper"] = partial(hopper_linear.product, *arguments)
        for config in CONFIGS:
            if "fp8" in what:
                config = {**config, "BLOCK_K": 2 * config["BLOCK_K"]}
            name = "x".join(str(value) for value in config.values())
            runs[f"{what} {name}"] = partial(linear_kernel.product, *arguments, config=config)
    return runs


def row_kernels(dim: int) -> dict[str, Callable[[], Any]]:
    """Norms, gate and their backwards, with the bytes that each has to move in the name."""
    bf16: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    x, u, dout = (torch.randn(TOKENS, dim, **bf16) for _ in range(3))
    gradient = torch.randn(TOKENS, 4 * dim, **bf16)
    weight, bias = torch.ones(dim, device="cuda"), torch.zeros(dim, device="cuda")
    _, mean, rstd = layer_norm.forward(x, weight, bias, 1e-6)
    gate: dict[str, Any] = {"num_groups": 1, "x_TD": None, "dropout": 0.0, "seed": 0}
    return {
        "layer norm (2 rows)": lambda: layer_norm.forward(x, weight, bias, 1e-6),
        "layer norm backward (4)": lambda: layer_norm.backward(dout, x, weight, mean, rstd, u),
        "gated norm (3)": lambda: gated_norm.forward(x, u, weight, bias, 1e-6, **gate),
        "gated norm backward (6)": lambda: gated_norm.backward(
            dout, x, u, weight, bias, 1e-6, residual_TD=dout, du=gradient[:, :dim], **gate
        ),
        "layer norm fp8 (1.5)": lambda: fp8.layer_norm(x, weight, bias, 1e-6),
        "gated norm fp8 (2.5)": lambda: fp8.gated_norm(x, u, weight, bias, 1e-6),
    }


def main() -> None:
    """Prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    json_path: Path | None = parser.parse_args().json
    results: dict[str, dict[str, float]] = {}
    for dim in (512, 1024):
        runs = {**row_kernels(dim), **products(dim)}
        # Compilation holds no lock of Python's: several at once.
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            list(pool.map(_compile, runs.values()))
        torch.cuda.synchronize()
        results[str(dim)] = {name: time_ms(run) for name, run in runs.items()}
        for name, ms in results[str(dim)].items():
            print(f"d {dim:5} {name:60} {ms:8.3f} ms")
    if json_path:
        json_path.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "ms": results}, indent=1))


def _compile(run: Callable[[], Any]) -> None:
    try:
        run()
    except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError) as error:
        print(f"does not run: {error!r:.100}")


if __name__ == "__main__":
    main()
