"""Times the products and row kernels of an HSTU layer one by one, so that tiles and fusions are chosen by measurement.

Run on a GPU: python -m benchmarks.layer_products [--json FILE]
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

from attention_kernels import fp8, gated_norm, layer_norm, linear, linear_kernel, uvqk

TOKENS = 131072
CONFIGS = [
    {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": w, "num_stages": s}
    for m, n, k, w, s in [
        (128, 128, 64, 8, 3),
        (128, 128, 64, 4, 3),
        (128, 256, 64, 8, 3),
        (128, 128, 64, 8, 4),
        (128, 128, 32, 8, 4),
        (256, 128, 64, 8, 3),
        (128, 64, 64, 4, 4),
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
    u, rest = torch.empty(TOKENS, dim, **bf16), torch.empty(TOKENS, 3 * dim, **bf16)
    raw, out = torch.empty(TOKENS, 4 * dim, **bf16), torch.empty(TOKENS, dim, **bf16)
    configs = CONFIGS if dim == 512 else CONFIGS[:5]
    runs: dict[str, Callable[[], Any]] = {
        "uvqk cublas": lambda: torch.addmm(bias.to(torch.bfloat16), x, w1),
        "uvqk silu kernel, in place": lambda: uvqk.forward(raw, dim, 4 * dim, out=raw[:, dim:]),
        "uvqk silu kernel, new tensor": lambda: uvqk.forward(raw, dim, 4 * dim),
        "output addmm": lambda: torch.addmm(residual, x, w2),
        "output cublas without residual": lambda: x @ w2,
    }
    for config in configs:
        name = "x".join(str(value) for value in config.values())
        runs[f"uvqk fused {name}"] = partial(
            linear_kernel.launch, x, w1, rest, u=u, u_width=dim, active=4 * dim, bias=bias, config=config
        )
        runs[f"uvqk fused keeping raw {name}"] = partial(
            linear_kernel.launch, x, w1, rest, u_width=dim, raw=raw, active=4 * dim, bias=bias, config=config
        )
        runs[f"output residual kernel {name}"] = partial(
            linear_kernel.launch, x, w2, out, residual=residual, config=config
        )
    x8, w18, w28 = (linear.quantise_rows(t, backend="triton") for t in (x, w1.t(), w2.t()))
    runs["uvqk fp8 scaled_mm"] = lambda: linear.matmul_fp8(*x8, *w18, bias=bias, dtype=torch.bfloat16, backend="triton")
    for config in configs:
        config = {**config, "BLOCK_K": 2 * config["BLOCK_K"]}
        name = "x".join(str(value) for value in config.values())
        runs[f"output fp8 residual kernel {name}"] = partial(
            linear_kernel.launch,
            x8[0],
            w28[0],
            out,
            b_is_nk=True,
            row_scale=x8[1],
            column_scale=w28[1],
            residual=residual,
            config=config,
        )
    return runs


def row_kernels(dim: int) -> dict[str, Callable[[], Any]]:
    """Norms, gate and their backwards, with the bytes that each has to move in the name."""
    bf16: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    x, u, dout = (torch.randn(TOKENS, dim, **bf16) for _ in range(3))
    raw, gradient = (torch.randn(TOKENS, 4 * dim, **bf16) for _ in range(2))
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
        "silu backward (12)": lambda: uvqk.backward_(gradient, raw, 4 * dim),
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
