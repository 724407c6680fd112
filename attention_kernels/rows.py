"""How kernels that work on whole rows are cut into blocks and programs."""

import functools

import torch
import triton

_ELEMENTS_PER_BLOCK = 4096
"""Float32 values of one operand that a program of 8 warps keeps in registers: 16 a thread."""
_INTERPRETER_PROGRAMS = 4
"""Few, because the interpreter runs them one after another."""
_PROGRAMS_PER_MULTIPROCESSOR = 4


def row_blocks(width: int) -> tuple[int, int, int]:
    """(rows of a block, columns rounded up to a power of two, warps) for rows of `width` elements."""
    columns = max(16, triton.next_power_of_2(width))
    rows = max(1, _ELEMENTS_PER_BLOCK // columns)
    return rows, columns, 8


@functools.cache
def serial_grid(device: torch.device) -> int:
    """Programs of a kernel that walks over all rows and keeps sums on the way."""
    if device.type != "cuda":
        return _INTERPRETER_PROGRAMS
    return _PROGRAMS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
