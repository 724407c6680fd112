"""Speed and memory of one HSTU layer on a GPU: peers' rows, lengths, recomputation, FP8, a breakdown.

Run on a GPU: python -m benchmarks.layer [--json FILE]; then on any machine: python -m benchmarks.shown.layer_plot

All layers run over 131,072 tokens in sequences of equal length, bfloat16, two layers deep, on random inputs.  Times are
medians of `triton.testing.do_bench`.  FLOPs count allowed pairs, and no recomputation (`trainer.models.flops`).
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from attention_kernels import SemiLocalMask
from embeddings.hardware import GPUS
from trainer.models.flops import TRAINING_FACTOR, allowed_pairs, layer_flops
from trainer.models.hstu import HstuLayer, HstuTower, Stage, build_layer_spec
from trainer.models.layer_config import LayerConfig
from trainer.models.layout import SequenceLayout, candidate_rows, make_layout, take_rows

TOKENS = 131072
LAYERS = 2
PEAK_TFLOPS = GPUS["H200-141"].bf16_tflops
"""Dense bfloat16 of the H100 and H200, by their data sheet; MFU is relative to it."""
FULL = SemiLocalMask()
SEMI_LOCAL = SemiLocalMask(local=256, global_rows=256)
LOCAL = SemiLocalMask(local=256)
WIDE = LayerConfig(num_heads=4, qk_dim=256, value_dim=256)


def equal_layout(length: int, tokens: int = TOKENS) -> SequenceLayout:
    """Sequences of `length` events and nothing else."""
    host = torch.full((tokens // length,), length)
    none = torch.zeros_like(host)
    return make_layout(host.cuda(), none.cuda(), host, none)


def make_tower(
    config: LayerConfig, dim: int, mask: SemiLocalMask, layers: int = LAYERS, max_len: int = 2**16
) -> HstuTower:
    """A tower of equal layers."""
    spec = build_layer_spec(config, max_len=max_len)
    built = [HstuLayer(dim=dim, spec=spec) for _ in range(layers)]
    return HstuTower(built, [Stage(num_layers=layers, mask=mask)]).cuda()


def milliseconds(function: Callable[[], Any]) -> float:
    """Median of repeated runs, the first one (compilation) left out."""
    function()
    return float(triton.testing.do_bench(function, warmup=20, rep=120, return_mode="median"))


def measure(config: LayerConfig, dim: int, length: int, mask: SemiLocalMask, *, train: bool = True) -> dict[str, float]:
    """Milliseconds, million token-layers a second and MFU forward and training, and memory, of a layer."""
    tower, layout = make_tower(config, dim, mask), equal_layout(length)
    x = torch.randn(TOKENS, dim, device="cuda", dtype=torch.bfloat16)
    dout = torch.randn_like(x)
    pairs = (TOKENS // length) * allowed_pairs(
        length, local=mask.local, global_rows=mask.global_rows, global_columns=mask.global_columns
    )
    flops = LAYERS * float(layer_flops(config, dim=dim, num_tokens=TOKENS, pairs=pairs).forward)

    @torch.no_grad()
    def forward() -> Tensor:
        out: Tensor = tower(x, layout)[0]
        return out

    leaf = x.clone().requires_grad_()

    def training() -> None:
        leaf.grad = None
        tower(leaf, layout)[0].backward(dout)

    ms = milliseconds(forward)
    result = {"forward_ms": ms / LAYERS, "forward_mtokens": TOKENS * LAYERS / ms / 1e3}
    result["forward_mfu"] = flops / ms / 1e9 / PEAK_TFLOPS
    if not train:
        return result
    ms = milliseconds(training)
    result |= {"train_ms": ms / LAYERS, "train_mtokens": TOKENS * LAYERS / ms / 1e3}
    result["train_tflops"] = TRAINING_FACTOR * flops / ms / 1e9
    result["train_mfu"] = result["train_tflops"] / PEAK_TFLOPS
    return result | memory(tower, leaf, dout, layout)


def memory(tower: HstuTower, leaf: Tensor, dout: Tensor, layout: SequenceLayout) -> dict[str, float]:
    """GiB kept for the backward a layer, its bytes a token, and the peak of both layers, above the inputs."""
    leaf.grad = None
    for parameter in tower.parameters():
        parameter.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = tower(leaf, layout)[0]
    # The output is the next layer's input and counted there.
    kept = (torch.cuda.memory_allocated() - before) / LAYERS
    out.backward(dout)
    peak = torch.cuda.max_memory_allocated() - before
    return {"kept_gib": kept / 2**30, "kept_bytes_per_token": kept / TOKENS, "peak_gib": peak / 2**30}


def peers_rows() -> dict[str, Any]:
    """The four rows of the design's section 2, for both variants."""
    rows: dict[str, Any] = {}
    for variant in ("paper", "production"):
        narrow = LayerConfig(variant=variant)
        wide = replace(WIDE, variant=variant)
        rows[f"{variant}: d 512, L 4096, full causal"] = measure(narrow, 512, 4096, FULL)
        rows[f"{variant}: d 512, L 16384, full causal"] = measure(narrow, 512, 16384, FULL)
        rows[f"{variant}: d 512, L 16384, semi-local 256 + 256"] = measure(narrow, 512, 16384, SEMI_LOCAL)
        rows[f"{variant}: d 1024, L 4096, full causal"] = measure(wide, 1024, 4096, FULL)
    rows["paper: d 512, L 16384, local 256"] = measure(LayerConfig(), 512, 16384, LOCAL)
    return rows


def lengths() -> dict[str, Any]:
    """HSTU (full causal) beside ULTRA (256 + 256), paper's layer, 1K to 64K."""
    return {
        name: {length: measure(LayerConfig(), 512, length, mask) for length in (2**i for i in range(10, 17))}
        for name, mask in (("full causal", FULL), ("semi-local 256 + 256", SEMI_LOCAL))
    }


def recomputation() -> dict[str, Any]:
    """What each thing kept instead of rebuilt saves in time and costs in memory (semi-local, L 16,384)."""
    keeping: dict[str, dict[str, Any]] = {
        "rebuild all": {},
        "keep normed": {"recompute_normed": False},
        "keep gated": {"recompute_gated": False},
        "keep uvqk": {"recompute_uvqk": False},
        "keep all": {"recompute_normed": False, "recompute_uvqk": False, "recompute_gated": False},
    }
    return {
        name: measure(replace(LayerConfig(), **switches), 512, 16384, SEMI_LOCAL) for name, switches in keeping.items()
    }


def fp8() -> dict[str, Any]:
    """Forward of a layer in FP8 beside bfloat16, and its error."""
    rows: dict[str, Any] = {}
    for dim, config in ((512, LayerConfig()), (1024, WIDE)):
        for name, length, mask in (("full causal", 4096, FULL), ("semi-local 256 + 256", 16384, SEMI_LOCAL)):
            row: dict[str, Any] = {}
            for kind, quantised in (("bf16", False), ("fp8", True)):
                chosen = replace(config, fp8=quantised)
                row[f"{kind}_ms"] = measure(chosen, dim, length, mask, train=False)["forward_ms"]
                row[f"{kind}_kernels"] = _forward_kernels(chosen, dim, length, mask)
            row["speedup"] = row["bf16_ms"] / row["fp8_ms"]
            row["fp8_error"], row["bf16_error"] = _fp8_errors(config, dim, mask)
            rows[f"d {dim}, L {length}, {name}"] = row
    return rows


def _forward_kernels(config: LayerConfig, dim: int, length: int, mask: SemiLocalMask) -> dict[str, dict[str, float]]:
    tower, layout = make_tower(config, dim, mask), equal_layout(length)
    x = torch.randn(TOKENS, dim, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        return kernel_times(partial(tower, x, layout))


def _fp8_errors(config: LayerConfig, dim: int, mask: SemiLocalMask) -> tuple[float, float]:
    """Norm of the FP8 layer's difference from float32's over the norm of what the layer adds to its input.

    bfloat16's own error is the second number.
    """
    # Divided by much more than the length, attention would vanish beside the norm's epsilon, and rounding rule.
    tower, layout = make_tower(config, dim, mask, layers=1, max_len=1024), equal_layout(1024, 8192)
    x = torch.randn(8192, dim, device="cuda", dtype=torch.bfloat16)
    layer = tower.layers[0]
    assert isinstance(layer, HstuLayer)
    plan = layer.plan(layout, mask)
    with torch.no_grad():
        exact = layer(x.float(), plan)
        rounded = layer(x, plan)
        layer.spec = replace(layer.spec, fp8=True)
        quantised = layer(x, plan)
    added = (exact - x.float()).norm()
    return float((quantised.float() - exact).norm() / added), float((rounded.float() - exact).norm() / added)


def breakdown() -> dict[str, Any]:
    """Milliseconds a layer by kernel class, forward and backward, and the longest kernels."""
    result: dict[str, Any] = {}
    for name, length, mask in (("full causal L 4096", 4096, FULL), ("semi-local L 16384", 16384, SEMI_LOCAL)):
        tower, layout = make_tower(LayerConfig(), 512, mask), equal_layout(length)
        leaf = torch.randn(TOKENS, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        dout = torch.randn_like(leaf)
        result[name] = kernel_times(partial(_training_step, tower, leaf, layout, dout))
    return result


def _training_step(tower: HstuTower, leaf: Tensor, layout: SequenceLayout, dout: Tensor) -> None:
    leaf.grad = None
    tower(leaf, layout)[0].backward(dout)


def kernel_times(function: Callable[[], Any], steps: int = 4) -> dict[str, dict[str, float]]:
    """GPU milliseconds a layer by kernel class, and of the longest kernels by name."""
    for _ in range(3):
        function()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            function()
        torch.cuda.synchronize()
    classes: dict[str, float] = {}
    kernels: dict[str, float] = {}
    for event in profiler.key_averages():
        ms = event.self_device_time_total / 1e3 / steps / LAYERS
        kernels[event.key[:80]] = ms
        kind = _kernel_class(event.key)
        classes[kind] = classes.get(kind, 0.0) + ms
    longest = sorted(kernels.items(), key=lambda item: -item[1])[:16]
    return {"classes": classes, "longest": dict(longest)}


def _kernel_class(name: str) -> str:
    if name.removeprefix("hopper_") in ("forward_kernel", "dq_kernel", "dkdv_kernel"):
        return "attention"
    if any(part in name for part in ("gemm", "nvjet", "cutlass", "_matmul_kernel", "xmma")):
        return "products"
    return "elementwise and the rest"


def candidates() -> dict[str, Any]:
    """Forward and backward of a ranker's last layer, of all rows and of 64 candidates a user, milliseconds.

    `_gpu_ms` is the sum of the kernels' times: one layer alone waits for the host.  Inputs are sequences of 4,096 or
    16,384 tokens, candidates included; the loss depends on candidates alone.
    """
    result: dict[str, Any] = {}
    for name, config, dim, length, mask in (
        ("d 512, L 4096, full causal", LayerConfig(), 512, 4096, FULL),
        ("d 512, L 16384, full causal", LayerConfig(), 512, 16384, FULL),
        ("d 512, L 16384, semi-local 256 + 256", LayerConfig(), 512, 16384, SEMI_LOCAL),
        ("production: d 512, L 16384, full causal", LayerConfig(variant="production"), 512, 16384, FULL),
        ("d 1024, L 4096, full causal", WIDE, 1024, 4096, FULL),
    ):
        tower = make_tower(config, dim, mask, layers=1)
        history, number = torch.full((TOKENS // length,), length - 64), torch.full((TOKENS // length,), 64)
        layout = make_layout(history.cuda(), number.cuda(), history, number)
        leaf = torch.randn(TOKENS, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        rows = candidate_rows(layout)
        dout = torch.randn(rows.numel(), dim, device="cuda", dtype=torch.bfloat16)

        def all_rows(
            tower: HstuTower = tower, leaf: Tensor = leaf, layout: SequenceLayout = layout, rows: Tensor = rows
        ) -> Tensor:
            return take_rows(tower(leaf, layout)[0], rows)

        def at_candidates(tower: HstuTower = tower, leaf: Tensor = leaf, layout: SequenceLayout = layout) -> Tensor:
            return tower.at_candidates(leaf, layout)

        row: dict[str, float] = {}
        for kind, function in (("all_rows", all_rows), ("at_candidates", at_candidates)):
            run = partial(_backward, function, leaf, dout)
            row[f"{kind}_ms"] = milliseconds(run)
            row[f"{kind}_gpu_ms"] = LAYERS * sum(kernel_times(run)["classes"].values())
        result[name] = row | {"gpu_share": row["at_candidates_gpu_ms"] / row["all_rows_gpu_ms"]}
    return result


def _backward(function: Callable[[], Tensor], leaf: Tensor, dout: Tensor) -> None:
    leaf.grad = None
    torch.autograd.backward(function(), dout)


def synchronisations() -> int:
    """Host waits in a forward and a backward: 0, or torch raises."""
    tower, layout = make_tower(LayerConfig(), 512, SEMI_LOCAL), equal_layout(4096)
    leaf = torch.randn(TOKENS, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dout = torch.randn_like(leaf)
    tower(leaf, layout)[0].backward(dout)
    torch.cuda.set_sync_debug_mode("error")
    try:
        tower(leaf, layout)[0].backward(dout)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return 0


PARTS: dict[str, Callable[[], Any]] = {
    "peers": peers_rows,
    "candidates": candidates,
    "synchronisations": synchronisations,
    "breakdown": breakdown,
    "fp8": fp8,
    "recomputation": recomputation,
    "lengths": lengths,
}


def main() -> None:
    """Runs the parts, prints each as it is done, and writes JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/layer.json"))
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    arguments = parser.parse_args()
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "tokens": TOKENS, "torch": torch.__version__}
    for part in arguments.parts:
        torch.manual_seed(0)
        results[part] = PARTS[part]()
        print(part, json.dumps(results[part], indent=1, default=str), flush=True)
        arguments.json.write_text(json.dumps(results, indent=1))
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
