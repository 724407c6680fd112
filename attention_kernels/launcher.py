"""How every kernel is launched, in about a fifth of the host's time that Triton takes.

Triton binds and examines all arguments on each call, which takes the host longer than a short kernel takes the GPU.
`launch` remembers what Triton compiled for arguments of the same kind (types, alignment, divisibility) and calls that,
past the hooks by which a profiler may follow Triton's launches (PyTorch's profiler and Nsight need none).

Triton compiles a kernel at its first launch, one after another, a second each.  `compiling_together` goes before: a
pass through the same code that compiles its kernels side by side and runs none.
"""

import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch import Tensor
from triton import AsyncCompileMode, FutureKernel
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton runs its interpreter, which has no inline assembly."""
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[None, ...], Any]] = {}
"""What Triton compiled, what its launcher takes besides the arguments, and the kernel, which must outlive its id."""
_compiling: dict[tuple[Any, ...], Any] | None = None
"""Under `compiling_together`, what Triton is compiling, by the same keys."""


class Blocks:
    """A tensor that the tensor memory accelerator (TMA) reads or writes in blocks; an argument of `launch`.

    Triton's descriptors without their checks, of which there are several a launch.
    """

    __slots__ = ("base", "block_shape", "layout", "padding", "shape", "strides")

    def __init__(
        self,
        base: Tensor,
        block_shape: Sequence[int],
        shape: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
        layout: NVMMASharedLayout | None = None,
    ) -> None:
        """`shape` and `strides` are the tensor's own if None; `layout` is that of a Gluon kernel's shared memory."""
        self.base = base
        self.block_shape = block_shape
        self.shape = base.shape if shape is None else shape
        self.strides = base.stride() if strides is None else strides
        self.layout = layout
        self.padding = "zero"

    def descriptor(self) -> Any:
        """The tensor's description in the form that Triton takes."""
        lists = (list(self.shape), list(self.strides), list(self.block_shape))
        if self.layout is None:
            return TensorDescriptor(self.base, *lists)
        return GluonDescriptor(self.base, *lists, self.layout)


def check_device(x: Tensor) -> None:
    """Kernels run on the current device: tensors must lie there."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        raise ValueError(
            f"tensors are on {x.device}, but kernels run on the current device, cuda:{torch.cuda.current_device()}: "
            f"call torch.cuda.set_device({x.get_device()}) first, or use torch.cuda.device as a context"
        )


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """`kernel[grid](*arguments, **constants)`, on the current stream.

    `arguments` are all that the compiled kernel receives, in order: tensors, `Blocks`, numbers and None.  `constants`
    are its compile-time arguments, which follow in its signature, and Triton's options.
    """
    if INTERPRETED:
        if _compiling is None:
            _call(kernel, grid, arguments, constants)
        return
    device = torch.cuda.current_device()
    key = (id(kernel), device, *map(_kind, arguments), *constants, *constants.values())
    found = _compiled.get(key)
    if _compiling is not None:
        if found is None and key not in _compiling:
            _compiling[key] = kernel.warmup(*_described(arguments), grid=grid, **constants)
        return
    if found is None:
        compiled = _call(kernel, grid, arguments, constants)
        # The launcher that Triton generates takes compile-time arguments too, and ignores them.
        _compiled[key] = (compiled, (None,) * (len(kernel.arg_names) - len(arguments)), kernel)
        return
    compiled, ignored, _ = found
    x, y, z = (*grid, 1, 1)[:3]
    stream = driver.active.get_current_stream(device)
    no_hooks = (None, None, None)
    compiled.run(x, y, z, stream, compiled.function, compiled.packed_metadata, *no_hooks, *arguments, *ignored)


@contextmanager
def compiling_together() -> Iterator[None]:
    """Kernels that are launched inside are compiled side by side and not run: what they would write keeps what it held.

    Those of other threads, as autograd's, are compiled there, one after another.  What cannot be compiled is no error
    here: it will be one where it is launched.
    """
    global _compiling
    device = torch.cuda.current_device() if torch.cuda.is_available() else -1
    with ThreadPoolExecutor() as pool:
        _compiling = {}
        try:
            with AsyncCompileMode(pool, ignore_errors=True):
                yield
            list(pool.map(_load, _compiling.values(), itertools.repeat(device)))
        finally:
            _compiling = None


def _load(kernel: Any, device: int) -> None:
    """Build what launches a kernel and load both, as Triton does when first asked for `run`."""
    compiled = kernel.result(ignore_errors=True) if isinstance(kernel, FutureKernel) else kernel
    # Each thread has a current device of its own.
    with torch.cuda.device(device):
        _ = compiled and compiled.run


def _call(kernel: triton.JITFunction[Any], grid: tuple[int, ...], arguments: Sequence[Any], constants: Any) -> Any:
    return kernel[grid](*_described(arguments), **constants)


def _described(arguments: Sequence[Any]) -> list[Any]:
    """The arguments, with descriptors in the place of `Blocks`."""
    return [x.descriptor() if isinstance(x, Blocks) else x for x in arguments]


def _kind(x: Any) -> Any:
    """Equal for arguments that one compiled kernel takes; at least as fine as Triton's own distinction."""
    kind = type(x)
    if kind is int:
        return x == 1, x % 16 == 0, x.bit_length() > 31
    if kind is Blocks:
        return x.base.dtype, *x.block_shape, x.layout is None
    if issubclass(kind, Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    return kind
