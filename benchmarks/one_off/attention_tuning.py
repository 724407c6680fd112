"""Measures tile sizes of the attention kernels; what it finds is written by hand into
`attention_kernels/attention/portable/tuning.py`.

Run on a GPU: python -m benchmarks.one_off.attention_tuning [--lengths 2048 16384] [--json FILE]

Times are of replayed CUDA graphs, so that the host's part is left out.  Every variant is checked against the float64
reference on a small jagged batch before it is timed.
"""

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
from pathlib import Path
from typing import Any

import torch
import triton

from attention_kernels import SemiLocalMask, make_plan, reference
from attention_kernels.attention.portable import launchers
from attention_kernels.attention.portable.launchers import Backward
from attention_kernels.attention.portable.tuning import AttentionConfig, TileConfig
from attention_kernels.attention.schedule import schedules

HEADS, SIZE, TOKENS = 4, 128, 65536
MASKS = {
    "full": SemiLocalMask(),
    "local": SemiLocalMask(local=256),
    "semi": SemiLocalMask(local=256, global_rows=256),
}
FIELDS = ("rows", "keys", "warps", "stages", "registers")
VARIANTS: dict[str, list[tuple[int | None, ...]]] = {
    "forward": [
        (64, 64, 4, 2, None), (64, 64, 4, 3, None), (64, 32, 4, 2, None), (64, 32, 4, 2, 128), (64, 32, 4, 3, None),
        (64, 32, 4, 3, 128), (64, 32, 4, 4, None), (128, 64, 4, 2, None), (128, 64, 8, 2, 128), (128, 64, 8, 3, None),
        (128, 32, 4, 2, None), (128, 32, 4, 3, None), (128, 32, 8, 2, 128), (128, 128, 8, 2, None),
    ],
    "dq": [
        (64, 64, 4, 1, None), (64, 64, 4, 2, None), (64, 64, 4, 1, 168), (64, 32, 4, 1, None), (64, 32, 4, 1, 128),
        (64, 32, 4, 2, None), (64, 32, 4, 2, 168), (64, 32, 4, 3, None), (128, 64, 8, 2, None), (128, 64, 8, 3, None),
        (128, 32, 8, 2, 128), (128, 32, 4, 2, None), (128, 32, 8, 3, None), (128, 128, 8, 1, None),
    ],
    "dkdv": [
        (64, 64, 4, 1, None), (64, 64, 4, 2, None), (32, 64, 4, 1, None), (32, 64, 4, 2, None), (32, 64, 4, 2, 168),
        (32, 64, 4, 3, None), (32, 64, 4, 3, 168), (64, 128, 8, 2, None), (64, 128, 8, 3, None), (32, 128, 8, 2, None),
        (32, 128, 8, 3, None), (16, 64, 4, 3, None),
    ],
}  # fmt: skip


def tile_of(sizes: tuple[int | None, ...]) -> TileConfig:
    fields: dict[str, Any] = dict(zip(FIELDS, sizes, strict=True))
    return TileConfig(**fields)


def inputs(lengths: list[int]) -> tuple[Any, ...]:
    total = sum(lengths)
    tensors = [torch.randn(total, HEADS, SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], device="cuda")
    return *tensors, offsets


def runner(kernel: str, mask: SemiLocalMask, tile: TileConfig, data: tuple[Any, ...], max_len: int) -> Any:
    """A function that runs one kernel alone, with a plan that has its schedule, and returns its results."""
    dout, q, k, v, offsets = data
    plan = make_plan(offsets, mask, max_len=max_len)
    config = AttentionConfig(forward=tile, dq=tile, dkdv=tile)
    if kernel == "forward":
        return lambda: (launchers.forward(q, k, v, plan, config=config),)
    dq, dk, dv = (torch.full_like(x, torch.nan) for x in (q, k, v))
    call = Backward(dout=dout, q=q, k=k, v=v, plan=plan, dq=dq, dk=dk, dv=dv)
    by_rows = kernel == "dq"
    blocks = {"row_block": tile.rows if by_rows else None, "key_block": None if by_rows else tile.keys}
    rows, keys = schedules(plan, launchers.shape_of(q, k, v), **blocks)

    def run() -> tuple[torch.Tensor, ...]:
        if rows is not None:
            launchers.backward_rows(call, None, rows, tile)
        if keys is not None:
            launchers.backward_keys(call, (None, None), keys, tile)
        return (dq,) if by_rows else (dk, dv)

    return run


def check(job: tuple[str, str, tuple[int | None, ...]]) -> tuple[tuple[str, str, tuple[int | None, ...]], str]:
    """Compiles a variant in a process of its own (the cache is shared) and compares it with the reference."""
    kernel, name, sizes = job
    torch.manual_seed(0)
    data = inputs([1000, 0, 1, 777, 64, 2000])
    dout, q, k, v, offsets = data
    tile = tile_of(sizes)
    plan = make_plan(offsets, MASKS[name], max_len=2000)
    dout, q, k, v = (x.double() for x in (dout, q, k, v))
    try:
        results = runner(kernel, MASKS[name], tile, data, 2000)()
    except triton.runtime.errors.OutOfResources as error:
        return job, f"does not fit: {error}"
    if kernel == "forward":
        expected: Any = (reference.forward(q, k, v, plan),)
    else:
        gradients = reference.backward(dout, q, k, v, plan)
        expected = gradients[:1] if kernel == "dq" else gradients[1:]
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(results, expected, strict=True)]
    return job, "" if max(errors) < 1e-2 else f"wrong: errors {errors}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 16384])
    parser.add_argument("--masks", nargs="+", default=list(MASKS))
    parser.add_argument("--kernels", nargs="+", default=list(VARIANTS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    jobs = [
        (kernel, mask, sizes)
        for kernel, mask in itertools.product(arguments.kernels, arguments.masks)
        for sizes in VARIANTS[kernel]
    ]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(12, mp_context=context) as pool:
        verdicts = dict(pool.map(check, jobs))
    results = []
    for kernel, name, sizes in jobs:
        tile = tile_of(sizes)
        if verdicts[kernel, name, sizes]:
            print(kernel, name, sizes, verdicts[kernel, name, sizes][:300], flush=True)
            continue
        times = []
        for length in arguments.lengths:
            data = inputs([length] * (TOKENS // length))
            run = runner(kernel, MASKS[name], tile, data, length)
            times.append(triton.testing.do_bench_cudagraph(run, rep=40, return_mode="median"))
        results.append({"kernel": kernel, "mask": name, "tile": sizes, "ms": times})
        print(f"{kernel:8s} {name:6s} {sizes!s:25s}", *(f"{ms:.4f}" for ms in times), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
