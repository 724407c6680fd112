"""How fast is semi-local attention, forward and backward, from 2K to 64K positions?

Run on a GPU: python -m benchmarks.attention [--lengths 2048 ...] [--kernels ours cudnn flex reference] [--json FILE]

65,536 tokens in sequences of one length, 4 heads of 128, bfloat16, random normal inputs; medians of
`triton.testing.do_bench`.  The last column, for our kernels, times replayed CUDA graphs: it leaves out the host's part,
which a step that keeps the GPU busy hides.  TFLOP/s count allowed (query, key) pairs only: 4 x size a pair and head
forward, 10 x size backward.  Bytes are the fewest: every input read and every output written once.  cuDNN and
FlexAttention compute softmax attention under the same mask: a yardstick, not the same function.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from attention_kernels import SemiLocalMask, attention_backward, attention_forward, hstu_attention, make_plan
from benchmarks.measured_on import measured_on
from trainer.models.flops import allowed_pairs

TOKENS, HEADS, SIZE = 65536, 4, 128
MASKS = {
    "full causal": SemiLocalMask(),
    "local 256": SemiLocalMask(local=256),
    "semi-local 256 + 256": SemiLocalMask(local=256, global_rows=256),
    "semi-local 256 + 256, 4 context": SemiLocalMask(local=256, global_rows=256, num_context=4),
}
# The dense reference takes seconds beyond this.
_MAX_REFERENCE_LEN = 4096
# FlexAttention compiles for many seconds a shape.
_FLEX_LENGTHS = (2048, 16384)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time attention forward and backward on one GPU.")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--kernels", nargs="+", choices=list(RUNNERS), default=list(RUNNERS))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/attention.json"))
    arguments = parser.parse_args()
    rows = []
    for name, mask in MASKS.items():
        titles = f"{'TFLOP/s':>15s} {'GB/s':>15s} {'GPU alone, ms':>15s}"
        print(f"\n{name}\n{'kernel':12s} {'length':>7s} {'fwd ms':>8s} {'bwd ms':>8s} {titles}")
        for kernel in arguments.kernels:
            for length in arguments.lengths:
                torch.manual_seed(0)
                functions = RUNNERS[kernel](mask, length)
                if functions is None:
                    continue
                row = measure(name, kernel, mask, length, *functions)
                rows.append(row)
                print(describe(row), flush=True)
    result = {"hardware": measured_on(), "shape": {"tokens": TOKENS, "heads": HEADS, "size": SIZE}, "rows": rows}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(
    name: str, kernel: str, mask: SemiLocalMask, length: int, forward: Callable[[], Any], backward: Callable[[], Any]
) -> dict[str, Any]:
    """One row of the table."""
    forward_ms, backward_ms = (
        triton.testing.do_bench(run, warmup=25, rep=100, return_mode="median") for run in (forward, backward)
    )
    graph_ms = graph_times(mask, length) if kernel == "ours" else (None, None)
    of_sequence = allowed_pairs(
        length - mask.num_context, num_context=mask.num_context, local=mask.local, global_rows=mask.global_rows
    )
    pairs = float(of_sequence) * (TOKENS // length) * HEADS
    tensor_bytes = TOKENS * HEADS * SIZE * 2
    return {
        "mask": name,
        "kernel": kernel,
        "length": length,
        "forward_ms": forward_ms,
        "backward_ms": backward_ms,
        "forward_gpu_ms": graph_ms[0],
        "backward_gpu_ms": graph_ms[1],
        "forward_tflops": pairs * 4 * SIZE / forward_ms / 1e9,
        "backward_tflops": pairs * 10 * SIZE / backward_ms / 1e9,
        # q, k, v in, output out; then q, k, v and dout in, three gradients out.
        "forward_bytes": 4 * tensor_bytes,
        "backward_bytes": 7 * tensor_bytes,
    }


def describe(row: dict[str, Any]) -> str:
    rates = f"{row['forward_tflops']:.0f} / {row['backward_tflops']:.0f}"
    forward, backward = (row[f"{x}_bytes"] / row[f"{x}_ms"] / 1e6 for x in ("forward", "backward"))
    times = f"{row['forward_ms']:8.3f} {row['backward_ms']:8.3f}"
    graphs = "" if row["forward_gpu_ms"] is None else f"{row['forward_gpu_ms']:.3f} / {row['backward_gpu_ms']:.3f}"
    rate = f"{forward:.0f} / {backward:.0f}"
    return f"{row['kernel']:12s} {row['length']:7d} {times} {rates:>15s} {rate:>15s} {graphs:>15s}"


def graph_times(mask: SemiLocalMask, length: int) -> tuple[float, float]:
    """Milliseconds of our kernels alone, forward and backward, in replayed CUDA graphs."""
    forward_ms, backward_ms = (
        float(triton.testing.do_bench_cudagraph(run, rep=60, return_mode="median")) for run in _run_plan(mask, length)
    )
    return forward_ms, backward_ms


def _run_plan(mask: SemiLocalMask, length: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Our kernels as a layer calls them: with a plan that its stage has made."""
    (q, k, v), offsets = _packed(length)
    q, k, v = (x.detach() for x in (q, k, v))
    gradient = torch.randn_like(v)
    plan = make_plan(offsets, mask, max_len=length)
    return (lambda: attention_forward(q, k, v, plan)), (lambda: attention_backward(gradient, q, k, v, plan))


def _packed(length: int) -> tuple[list[Tensor], Tensor]:
    shape = (TOKENS, HEADS, SIZE)
    tensors = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    return tensors, torch.arange(0, TOKENS + 1, length, device="cuda")


def _run_hstu(backend: Any, mask: SemiLocalMask, length: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    (q, k, v), offsets = _packed(length)

    def forward() -> Tensor:
        return hstu_attention(q, k, v, offsets, mask, max_len=length, backend=backend)

    return forward, _backward_of(forward, [q, k, v])


def run_ours(mask: SemiLocalMask, length: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    return _run_hstu("triton", mask, length)


def run_planned(mask: SemiLocalMask, length: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    return _run_plan(mask, length)


def run_reference(mask: SemiLocalMask, length: int) -> tuple[Callable[[], Any], Callable[[], Any]] | None:
    return None if length > _MAX_REFERENCE_LEN else _run_hstu("reference", mask, length)


def run_cudnn(mask: SemiLocalMask, length: int) -> tuple[Callable[[], Any], Callable[[], Any]] | None:
    """cuDNN's softmax attention, which has the full causal mask only."""
    if mask != SemiLocalMask():
        return None
    q, k, v = _padded(length)

    def forward() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    return forward, _backward_of(forward, [q, k, v])


def run_flex(mask: SemiLocalMask, length: int) -> tuple[Callable[[], Any], Callable[[], Any]] | None:
    """PyTorch's FlexAttention, compiled, with the same mask as a block mask."""
    if length not in _FLEX_LENGTHS or mask.num_context > 0:
        return None
    q, k, v = _padded(length)
    global_start = length - mask.global_rows

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = k <= q
        if mask.local is not None:
            seen = seen & ((q - k <= mask.local) | (q >= global_start))
        return seen

    block_mask = create_block_mask(allowed, None, None, length, length, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)

    def forward() -> Any:
        return compiled(q, k, v, block_mask=block_mask)

    return forward, _backward_of(forward, [q, k, v])


def _padded(length: int) -> list[Tensor]:
    shape = (TOKENS // length, HEADS, length, SIZE)
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]


def _backward_of(forward: Callable[[], Tensor], tensors: list[Tensor]) -> Callable[[], Any]:
    result = forward()
    gradient = torch.randn_like(result)
    return lambda: torch.autograd.grad(result, tensors, gradient, retain_graph=True)


RUNNERS: dict[str, Callable[[SemiLocalMask, int], tuple[Callable[[], Any], Callable[[], Any]] | None]] = {
    "ours": run_ours,
    "planned": run_planned,
    "cudnn": run_cudnn,
    "flex": run_flex,
    "reference": run_reference,
}

if __name__ == "__main__":
    main()
