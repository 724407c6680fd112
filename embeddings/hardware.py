"""The one hardware table: GPUs, nodes that clusters are built of, and files that describe a node of your own.

The planner, the launcher, the trainer and the benchmarks read it.  A node's file holds the fields of a `NodeType`, in
JSON; `python -m embeddings probe` writes one with measured rates:

    {"cpus": 96, "gpus": 8, "hbm_gib": 139.8, "host_gib": 1800,
     "rates": {"device": 4800, "within_node": 450, "across_nodes": 50, "host_link": 50}}

Nothing here looks at the machine it runs on, or needs more than the standard library.
"""

import json
import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from embeddings.config import CACHED_PART
from embeddings.records import from_dict


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What one rank moves, in GB/s (10^9 bytes), and what it costs to begin, by which the planner compares."""

    device: float
    """Device memory; host memory for a CPU."""
    within_node: float
    """To other ranks of the node, one direction."""
    across_nodes: float
    """To ranks of other nodes, one direction."""
    across_racks: float | None = None
    """To ranks of nodes behind another switch, one direction; null takes `across_nodes`."""
    host_link: float
    """Between device and host memory; matters for the fused_uvm kernels only."""
    cached: float | None = None
    """Rows of a fused_uvm_caching table with uniform ids, `CACHED_PART` of it cached; null takes TorchRec's estimate.
    """
    uncached: float | None = None
    """Rows of a fused_uvm table; null takes TorchRec's estimate."""
    lookup_group_ms: float = 0.2
    """Fixed time a step of each lookup group: tables of one width, sharding type and kernel share one exchange of ids,
    one kernel and one exchange of rows, each way."""
    lookups_ms: float = 0.0
    """Fixed time a step of all lookups together; it makes no placement better than another."""
    id_ns: float = 0.0
    """Time in ns of each id besides its row: an update sorts ids first.  0 where it is not measured, as in TorchRec."""
    cache_ms: float = 0.0
    """Fixed time a step of each lookup group with a cache, which looks its ids up in it first; 0 where not measured."""
    cache_id_ns: float = 0.0
    """Time in ns of each id that a cache is asked for, whether its row is there or not; 0 where it is not measured."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in _MAY_BE_ZERO else LEAST
            if value is not None and not least <= value <= MOST:
                unit = {"ms": "ms", "ns": "ns"}.get(field.name[-2:], "GB/s")
                raise ValueError(
                    f"rate {field.name} must be a number of {unit} above 0, between {least} and {MOST:g}, got {value}"
                )

    def cached_rows(self, hit_rate: float) -> float:
        """GB/s of the rows of a fused_uvm_caching table of whose lookups this part is found in the cache.

        What uniform ids take beyond their hits, at the rate of the device, is what misses take.
        """
        uniform = self.cached
        if uniform is None:
            uniform = (CACHED_PART * self.device + (1 - CACHED_PART) * self.host_link) / 10
        # A hit takes no longer than uniform ids do, so that a miss takes no less and these come out as they are.
        hit = min(1 / self.device, 1 / uniform)
        miss = (1 / uniform - CACHED_PART * hit) / (1 - CACHED_PART)
        return 1 / (hit_rate * hit + (1 - hit_rate) * miss)

    def fixed_ms(self, groups: int, cached: int) -> float:
        """Fixed time a step of so many lookup groups, of which so many have a cache."""
        return self.lookups_ms + groups * self.lookup_group_ms + cached * self.cache_ms

    @property
    def uncached_rows(self) -> float:
        """GB/s of the rows of a fused_uvm table."""
        return self.host_link / 10 if self.uncached is None else self.uncached


LEAST, MOST = 1e-6, 1e12
"""Between these lies whatever can be measured, in any unit; beyond them numbers of floating point end."""
_MAY_BE_ZERO = ("lookups_ms", "id_ns", "cache_ms", "cache_id_ns")


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """A GPU as its vendor and its driver describe it."""

    words: tuple[str, ...]
    """Words of the driver's name for it."""
    hbm_gib: float
    """Memory that the driver reports, which is a little less than the product's name says."""
    rates: Rates
    """Vendor's peaks; across nodes, one 200 Gb/s (A100) or 400 Gb/s (Hopper) network card a GPU."""
    bf16_tflops: float
    """Dense bfloat16, by the data sheet."""


def _sxm(chip: str, hbm_gib: float, device: float, bf16_tflops: float) -> Gpu:
    old = chip == "A100"
    rates = Rates(
        device=device,
        within_node=300 if old else 450,
        across_nodes=25 if old else 50,
        host_link=25 if old else 50,
    )
    return Gpu(words=(chip,), hbm_gib=hbm_gib, rates=rates, bf16_tflops=bf16_tflops)


GPUS: dict[str, Gpu] = {
    "A100-40": _sxm("A100", 39.4, 1555, 312),
    "A100-80": _sxm("A100", 79.1, 2039, 312),
    "H100-80": _sxm("H100", 79.6, 3350, 989),
    "H200-141": _sxm("H200", 139.8, 4800, 989),
    "H100-PCIe": Gpu(
        words=("H100", "PCIe"),
        hbm_gib=79.2,
        rates=Rates(device=2039, within_node=50, across_nodes=50, host_link=50),
        bf16_tflops=756,
    ),
}
"""Known GPUs by name."""


def gpu_with_name(name: str) -> Gpu | None:
    """The known GPU that the driver calls `name`; None for one that is not known.

    >>> gpu_with_name("NVIDIA H100 80GB HBM3").bf16_tflops, gpu_with_name("NVIDIA H100 PCIe").bf16_tflops
    (989, 756)
    >>> gpu_with_name("NVIDIA GH200 480GB") is None
    True
    """
    said = set(re.split(r"[^A-Za-z0-9]+", name))
    known = [gpu for gpu in GPUS.values() if said.issuperset(gpu.words)]
    return max(known, key=lambda gpu: len(gpu.words), default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeType:
    """A kind of node that clusters are built of; jobs take whole nodes."""

    cpus: int = 0
    """Cores; 0 where nobody said, which will do for planning."""
    gpus: int
    """NVIDIA GPUs, a rank each; 0 for a node that trains on its cores."""
    hbm_gib: float | None = None
    """GiB of device memory a GPU; null without GPUs."""
    host_gib: float
    """GiB of host memory a node, as a scheduler may hand it out."""
    rates: Rates
    """What a rank on this node reaches."""
    bf16_tflops: float | None = None
    """A GPU's peak in bfloat16; null where nobody said, which will do for what tables take."""
    calibration: str = ""
    """How the rates were measured; empty for peaks by data sheet."""

    def __post_init__(self) -> None:
        if self.gpus < 0 or self.cpus < 0:
            raise ValueError(f"a node has no negative number of GPUs or cores, got gpus={self.gpus}, cpus={self.cpus}")
        if self.hbm_gib is not None and not 0 < self.hbm_gib < math.inf:
            raise ValueError(f"hbm_gib must be a number of GiB above 0, got {self.hbm_gib}")
        if (self.gpus > 0) != (self.hbm_gib is not None):
            raise ValueError(f"hbm_gib={self.hbm_gib} with {self.gpus} GPUs: GPUs need it, and a CPU has none")
        if self.bf16_tflops is not None and not LEAST <= self.bf16_tflops <= MOST:
            raise ValueError(
                f"bf16_tflops must be a number of TFLOP/s between {LEAST} and {MOST:g}, got {self.bf16_tflops}"
            )
        if not self.calibration.isprintable():
            raise ValueError(f"calibration must be printable text of one line, got {self.calibration!r}")
        if not 0 < self.host_gib < math.inf:
            raise ValueError(f"host_gib must be a number of GiB above 0, got {self.host_gib}")

    @property
    def host_mib(self) -> int:
        """Host memory as schedulers count it."""
        return int(self.host_gib * 1024)


CPU_RATES = Rates(device=50, within_node=10, across_nodes=3, host_link=50, lookup_group_ms=2.0)
"""A rank of a multi-process job on one server: shared memory bandwidth, gloo over loopback and Ethernet; a lookup group
as measured with gloo (LOG.md)."""


def _cores(cpus: int, host_gib: float) -> NodeType:
    return NodeType(cpus=cpus, gpus=0, host_gib=host_gib, rates=CPU_RATES)


def _with_gpus(gpu: str, gpus: int, cpus: int, host_gib: float) -> NodeType:
    known = GPUS[gpu]
    return NodeType(
        cpus=cpus,
        gpus=gpus,
        hbm_gib=known.hbm_gib,
        host_gib=host_gib,
        rates=known.rates,
        bf16_tflops=known.bf16_tflops,
    )


NODES: dict[str, NodeType] = {
    "cpu-2": _cores(2, 6.75),
    "cpu-16": _cores(16, 58),
    "cpu-64": _cores(64, 234),
    "a100-40-8": _with_gpus("A100-40", 8, 92, 960),
    "a100-8": _with_gpus("A100-80", 8, 92, 960),
    "h100-8": _with_gpus("H100-80", 8, 184, 1800),
    "h200-1": _with_gpus("H200-141", 1, 16, 117),
    "h200-8": _with_gpus("H200-141", 8, 184, 1800),
}
"""Known nodes by name; cores and host memory as clouds commonly give them."""


def node_type(name: str) -> NodeType:
    """A known node (`h100x8` is read as `h100-8`), or that of a .json file.

    Raises:
        ValueError: neither a known name nor a file, or a wrong file; one line.
    """
    known = re.sub(r"x(\d+)$", r"-\1", name)
    if known in NODES:
        return NODES[known]
    if not name.endswith(".json"):
        raise ValueError(f"unknown machine {name!r}: known are {', '.join(NODES)}, or name a .json file")
    values = read_object(Path(name))
    try:
        return from_dict(NodeType, values)
    except ValueError as error:
        raise ValueError(f"{name}: a machine has gpus, hbm_gib, host_gib and rates ({error})") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is there twice in one object")
    return values


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file.

    Raises:
        ValueError: it cannot be read, states a key twice or holds something else; one line.
    """
    try:
        # Some editors begin a file with a mark of its encoding.
        values = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_object)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return values
