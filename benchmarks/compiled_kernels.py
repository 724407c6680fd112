"""What our kernels compile to for a Hopper GPU: registers, stack (spills), shared memory, instructions, and how many
barriers nobody waits for, which has to be 0.

Run anywhere, no GPU needed: python -m benchmarks.compiled_kernels [--sizes 64 128 256] [--json FILE]

Launches are caught and their kernels compiled by Triton and ptxas for compute capability 9.0, with the arguments that
the launchers chose.  The committed list, `benchmarks/results/compiled_kernels.json`, is the record of what the measured
kernels were: a change that was meant to change no kernel leaves it as it is, within a few instructions.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from attention_kernels import SemiLocalMask, launcher, make_plan, plan_of_targets
from attention_kernels.attention import schedule, tile_sums
from attention_kernels.attention.hopper import launchers as hopper
from attention_kernels.attention.portable import launchers as portable
from attention_kernels.attention.portable.launchers import Backward
from attention_kernels.layer import hopper_linear
from attention_kernels.layer.linear_kernel import Epilogue

SIZES = (64, 128, 256)
HEADS = 4
MULTIPROCESSORS = 132
MASKS = {
    "full causal": SemiLocalMask(),
    "window": SemiLocalMask(local=256, global_rows=256),
    # Rows of candidates alone.
    "targets": SemiLocalMask(local=256, global_rows=256),
}
PRODUCTS: dict[str, Callable[[Tensor], Epilogue]] = {
    "SiLU": lambda other: Epilogue(silu=True, bias=torch.empty(other.shape[1])),
    "SiLU and slopes": lambda other: Epilogue(silu=True, bias=torch.empty(other.shape[1]), slopes=other),
    "residual": lambda other: Epilogue(residual=other),
}
"""What happens to a layer's products before they are stored; beside its result."""


class HopperTarget:
    """What Triton asks of a GPU's driver when it compiles."""

    def get_current_device(self) -> int:
        """The device's number."""
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        """The default stream."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """Compute capability 9.0, 32 threads a warp."""
        return GPUTarget("cuda", 90, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile our kernels for a Hopper GPU and list what they take.")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="sizes of heads")
    parser.add_argument("--json", type=Path, default=None, help="write the list to this file")
    arguments = parser.parse_args()
    if launcher.INTERPRETED:
        sys.exit("error: TRITON_INTERPRET=1 compiles nothing: start Python without it")
    kernels = compile_all(tuple(arguments.sizes))
    for name, row in kernels.items():
        print(f"{name:52s} {json.dumps(row)}")
    if arguments.json is not None:
        result = {"triton": triton.__version__, "ptxas": triton.knobs.nvidia.ptxas.version, "kernels": kernels}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def compile_all(sizes: tuple[int, ...]) -> dict[str, dict[str, int]]:
    """Every kernel that a training step of these head sizes launches, by head size, mask and name."""
    driver.set_active(HopperTarget())
    kernels: dict[str, dict[str, int]] = {}
    case = ""

    def catch(kernel: Any, grid: tuple[int, ...], *values: Any, **constants: Any) -> None:
        described = [x.descriptor() if isinstance(x, launcher.Blocks) else x for x in values]
        compiled = kernel.warmup(*described, grid=(*grid, 1, 1)[:3], **constants)
        shared = int(compiled.metadata.shared)
        row = {"shared_bytes": shared} | _resources(compiled.asm["cubin"])
        if "ttng.init_barrier" in compiled.asm["ttgir"]:
            row["unwaited_barriers"] = unwaited_barriers(compiled.asm["ttgir"])
        kernels.setdefault(f"{case}, {kernel.__name__}", row)

    modules: tuple[Any, ...] = (hopper, portable, schedule, tile_sums, hopper_linear)
    for module in modules:
        module.launch = catch
        if hasattr(module, "multiprocessors"):
            module.multiprocessors = lambda device: MULTIPROCESSORS
    for size, (name, mask) in itertools.product(sizes, MASKS.items()):
        case = f"{size}, {name}"
        _run(size, mask, only_targets=name == "targets")
    for size, (name, epilogue) in itertools.product(sizes, PRODUCTS.items()):
        case = f"{size}, {name}"
        rows, weight, out = (torch.empty(x, HEADS * size, dtype=torch.bfloat16) for x in (1000, HEADS * size, 1000))
        hopper_linear.product(rows, weight, out, epilogue(out))
    return kernels


def unwaited_barriers(code: str) -> int:
    """Barriers that a kernel, in Triton's GPU dialect, sets up and nothing else uses.

    The compiler gives their memory to buffers that are made later, but what was set up as a barrier must not be written
    as data (PTX ISA, `mbarrier.inval`).
    """
    uses: dict[str, list[tuple[str, str]]] = {}
    for result, operation in re.findall(r"^\s*(?:(%\w+) = )?(.*)$", code, re.MULTILINE):
        for name in re.findall(r"%\w+", operation):
            uses.setdefault(name, []).append((result, operation))

    def only_set_up(name: str) -> bool:
        return all(
            operation.startswith("ttng.init_barrier")
            or (operation.startswith("ttg.memdesc_index") and only_set_up(result))
            for result, operation in uses[name]
        )

    barriers = re.findall(r"(%\w+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<\d+x1xi64", code)
    return sum(map(only_set_up, barriers))


def _run(size: int, mask: SemiLocalMask, *, only_targets: bool) -> None:
    """Forward and backward as a layer calls them."""
    plan = make_plan(torch.tensor([0, 400, 1000]), mask, num_targets=torch.tensor([3, 4]), max_len=1000)
    rows = 1000
    if only_targets:
        plan, rows = plan_of_targets(plan), 7
    q, dout, dq = (torch.empty(rows, HEADS, size, dtype=torch.bfloat16) for _ in range(3))
    k, v, dk, dv = (torch.empty(1000, HEADS, size, dtype=torch.bfloat16) for _ in range(4))
    hopper.forward(q, k, v, plan)
    call = Backward(dout=dout, q=q, k=k, v=v, plan=plan, dq=dq, dk=dk, dv=dv, scaled=True)
    hopper.backward(call, sums=True)


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread, bytes of stack a thread (where spilled registers go), instructions."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(cubin)
        knobs = triton.knobs.nvidia
        usage = subprocess.run([knobs.cuobjdump.path, "-res-usage", path], capture_output=True, text=True, check=True)
        code = subprocess.run([knobs.nvdisasm.path, "-c", path], capture_output=True, text=True, check=True)
    found = dict(re.findall(r"(REG|STACK):(\d+)", usage.stdout))
    instructions = len(re.findall(r"^\s*/\*[0-9a-f]+\*/", code.stdout, re.MULTILINE))
    return {"registers": int(found["REG"]), "stack_bytes": int(found["STACK"]), "instructions": instructions}


if __name__ == "__main__":
    main()
