"""How kernels that work on whole rows are cut into blocks and programs."""

import functools

import torch

_ELEMENTS_PER_BLOCK = 4096
"""Float32 values of one operand that a program of 8 warps keeps in registers: 16 a thread."""
_ELEMENTS_PER_WARP = 512
"""Likewise for a program that walks over rows: one warp holds a whole row up to this width, so that sums along the row
need no shared memory."""
_SERIAL_WARPS_PER_MULTIPROCESSOR = 16
_INTERPRETER_PROGRAMS = 2
"""Few, because the interpreter runs them one after another."""


def cdiv(count: int, block: int) -> int:
    """Blocks that cover `count`.  Triton's own function of this name costs the host 5 microseconds a call."""
    return -(-count // block)


def power_of_two(count: int) -> int:
    """The smallest power of two that is at least `count` > 0."""
    return 1 << (count - 1).bit_length()


def pad_size(size: int) -> int:
    """Sizes of blocks are powers of two, and products need at least 16."""
    return max(16, power_of_two(size))


def row_blocks(width: int) -> tuple[int, int, int]:
    """(rows of a block, columns rounded up to a power of two, warps) for rows of `width` elements."""
    columns = pad_size(width)
    rows = max(1, _ELEMENTS_PER_BLOCK // columns)
    return rows, columns, 8


def warp_blocks(width: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a block in which a warp holds whole rows, up to 1,024 elements: sums and maxima along a
    row need no shared memory."""
    columns = pad_size(width)
    return max(1, 2 * _ELEMENTS_PER_WARP // columns), columns, max(1, columns // (2 * _ELEMENTS_PER_WARP))


def serial_blocks(
    width: int, device: torch.device, warps_per_multiprocessor: int = _SERIAL_WARPS_PER_MULTIPROCESSOR
) -> tuple[int, int, int, int]:
    """(programs, rows, columns, warps) of a kernel that walks over all rows and keeps sums on the way.

    All programs must fit the device at once: what did not fit would start when the others end.
    """
    columns = pad_size(width)
    if device.type != "cuda":
        return _INTERPRETER_PROGRAMS, 16, columns, 1
    warps = max(1, columns // _ELEMENTS_PER_WARP)
    programs = multiprocessors(device) * max(1, warps_per_multiprocessor // warps)
    return programs, max(1, _ELEMENTS_PER_WARP // columns), columns, warps


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; the interpreter counts as a small one."""
    if device.type != "cuda":
        return _INTERPRETER_PROGRAMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether kernels may use what only Hopper GPUs have."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
