"""The machines a plan is made for: ranks, memory and bandwidths.  Nothing here looks at the machine it runs on."""

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True, slots=True)
class Bandwidths:
    """Peak rates of one rank, in GB/s (10^9 bytes).  The planner compares placements by them."""

    device: float
    """Device memory; host memory for a CPU."""
    within_node: float
    """To other ranks of the node, one direction."""
    across_nodes: float
    """To ranks of other nodes, one direction."""
    host_link: float
    """Between device and host memory; matters for the fused_uvm kernels only."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 < value < math.inf:
                raise ValueError(f"bandwidth {field.name} must be a number of GB/s above 0, got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """A GPU as its vendor and its driver describe it."""

    hbm_gib: float
    """Memory that the driver reports, which is a little less than the product's name says."""
    bandwidths: Bandwidths
    """Vendor's figures; across nodes, one 200 Gb/s (A100) or 400 Gb/s (Hopper) network card a GPU."""


GPUS: dict[str, Gpu] = {
    "A100-40": Gpu(hbm_gib=39.4, bandwidths=Bandwidths(device=1555, within_node=300, across_nodes=25, host_link=25)),
    "A100-80": Gpu(hbm_gib=79.1, bandwidths=Bandwidths(device=2039, within_node=300, across_nodes=25, host_link=25)),
    "H100-80": Gpu(hbm_gib=79.6, bandwidths=Bandwidths(device=3350, within_node=450, across_nodes=50, host_link=50)),
    "H200-141": Gpu(hbm_gib=139.8, bandwidths=Bandwidths(device=4800, within_node=450, across_nodes=50, host_link=50)),
}
"""Known GPUs by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeType:
    """A kind of node that clusters are built of."""

    gpus: int
    """GPUs, a rank each."""
    hbm_gib: float
    """GiB of device memory a GPU."""
    host_gib: float
    """GiB of host memory a node."""
    rates: Bandwidths
    """Of a rank."""

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise ValueError(f"a node has at least one GPU, got gpus={self.gpus}")

    def cluster(self, ranks: int) -> "Machine":
        """So many ranks on nodes of this type; fewer than a node has are a part of one."""
        return Machine(
            world_size=ranks,
            local_world_size=min(ranks, self.gpus),
            compute_device="cuda",
            hbm_gib=self.hbm_gib,
            ddr_gib=self.host_gib / self.gpus,
            rates=self.rates,
        )


def _eight(gpu: str, host_gib: float) -> NodeType:
    return NodeType(gpus=8, hbm_gib=GPUS[gpu].hbm_gib, host_gib=host_gib, rates=GPUS[gpu].bandwidths)


NODES: dict[str, NodeType] = {
    "a100-40x8": _eight("A100-40", 960),
    "a100x8": _eight("A100-80", 960),
    "h100x8": _eight("H100-80", 1800),
    "h200x8": _eight("H200-141", 1800),
}
"""Known nodes by name; host memory as clouds commonly give it."""

CPU_BANDWIDTHS = Bandwidths(device=50, within_node=10, across_nodes=3, host_link=50)
"""A rank of a multi-process job on one server: shared memory bandwidth, gloo over loopback and Ethernet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """The ranks of a job, all alike."""

    world_size: int
    """Ranks."""
    local_world_size: int
    """Ranks a node."""
    compute_device: str
    """Where tables and model live: cuda or cpu."""
    hbm_gib: float | None = None
    """GiB of device memory a rank; required for cuda, null for cpu."""
    ddr_gib: float = 128.0
    """GiB of host memory a rank: all there is for cpu; for cuda, room for the fused_uvm kernels."""
    rates: Bandwidths | None = None
    """What the planner compares placements by; null takes those of the known GPU whose memory is nearest."""

    def __post_init__(self) -> None:
        if self.world_size < 1 or self.local_world_size < 1 or self.world_size % self.local_world_size:
            raise ValueError(
                f"world_size={self.world_size} must be a positive multiple of "
                f"local_world_size={self.local_world_size}: every node runs the same number of ranks"
            )
        if self.compute_device not in ("cuda", "cpu"):
            raise ValueError(f"compute_device must be cuda or cpu, got {self.compute_device!r}")
        if (self.compute_device == "cuda") != (self.hbm_gib is not None):
            raise ValueError(f"hbm_gib={self.hbm_gib} on {self.compute_device}: cuda needs it, and a cpu has none")
        if not (0 < self.memory_gib < math.inf and 0 < self.ddr_gib < math.inf):
            raise ValueError(
                f"memory must be a number of GiB above 0, got hbm_gib={self.hbm_gib}, ddr_gib={self.ddr_gib}"
            )

    @property
    def memory_gib(self) -> float:
        """GiB a rank of the memory where the fused kernel keeps tables."""
        return self.ddr_gib if self.hbm_gib is None else self.hbm_gib

    @property
    def nearest_gpu(self) -> str | None:
        """The known GPU whose memory is nearest; its bandwidths stand in for this machine's.  None for a cpu."""
        memory = self.hbm_gib
        if memory is None:
            return None
        return min(GPUS, key=lambda name: abs(GPUS[name].hbm_gib - memory))

    @property
    def bandwidths(self) -> Bandwidths:
        """What the planner compares placements by."""
        if self.rates is not None:
            return self.rates
        name = self.nearest_gpu
        return CPU_BANDWIDTHS if name is None else GPUS[name].bandwidths

    @property
    def lookup_group_ms(self) -> float:
        """Fixed time a step of each lookup group: tables of one sharding type and kernel share one exchange of ids, one
        kernel and one exchange of rows, each way.  On a cpu measured with gloo (LOG.md), on a GPU assumed."""
        return 2.0 if self.compute_device == "cpu" else 0.2

    def describe(self) -> str:
        """One line for reports and errors."""
        nodes = self.world_size // self.local_world_size
        like = f", bandwidths of {self.nearest_gpu}" if self.nearest_gpu and self.rates is None else ""
        return (
            f"{self.world_size} {self.compute_device} ranks ({nodes} x {self.local_world_size}), "
            f"{self.memory_gib:g} GiB each{like}"
        )
