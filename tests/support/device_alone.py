"""On any machine: whether code keeps to the device, as what a CUDA graph records must, and a host that is not to wait.

Tensors on PyTorch's meta device stand for the device's, those of the CPU for the host's.
"""

import gc
from contextlib import nullcontext
from types import TracebackType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class DeviceAlone(TorchDispatchMode):
    """Inside, operations that the device cannot do alone raise AssertionError: copies between it and the host, both in
    one operation, tensors of the device that were made from the host's numbers, and sizes that depend on its values.

    Values asked for by the host are PyTorch's own error, as meta tensors have none.
    """

    def __enter__(self) -> "DeviceAlone":
        # Kept, so that no other storage gets an address that is known.
        self._known: dict[int, Tensor] = {}
        for each in gc.get_objects():
            if issubclass(type(each), Tensor) and each.is_meta:
                self._know(each)
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._known.clear()

    def _know(self, x: Tensor) -> None:
        self._known[x.untyped_storage()._cdata] = x

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        taken, given = ([x for x in tree_leaves(each) if isinstance(x, Tensor)] for each in ((args, kwargs), result))
        assert len({x.is_meta for x in (*taken, *(given if taken else ()))}) < 2, f"{operation} joins host and device"
        for x in taken:
            known = not x.is_meta or x.untyped_storage()._cdata in self._known
            assert known, f"{operation} takes {list(x.shape)} that was made from numbers of the host"
            assert not (x.is_meta and _counts_values(operation, taken, kwargs)), f"{operation} has a size to wait for"
        for x in given:
            if x.is_meta:
                self._know(x)
        return result


def _counts_values(operation: Any, taken: list[Tensor], kwargs: Any) -> bool:
    """Whether the result's size is a matter of values, as of a mask's."""
    if operation is torch.ops.aten.index.Tensor:
        return any(x.dtype == torch.bool for x in taken[1:])
    return torch.Tag.dynamic_output_shape in operation.tags and kwargs.get("output_size") is None


def without_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the meta device there is none, not even one that is off."""
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda _: torch.bfloat16)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
