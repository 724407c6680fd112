"""The ranks a plan is made for: how many, their memory and rates.  Nothing here looks at the machine it runs on."""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

from embeddings.hardware import CPU_RATES, GPUS, NodeType, Rates

MOST_RANKS = 2**20
"""Ten times the GPUs of the largest cluster that was ever built."""
MOST_GIB = 2**33
"""The memory that 63 bits can count."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """The ranks of a job, all alike."""

    world_size: int
    """Ranks of the job."""
    local_world_size: int
    """Ranks of a node."""
    whole_node: int | None = None
    """GPUs of a node of which the job takes a part, so that a larger job takes whole ones; null where it takes whole
    nodes already."""
    racks: int = 1
    """Groups of nodes, each behind a switch of its own, that the nodes are spread over."""
    compute_device: str
    """Where tables and model are computed: cuda or cpu."""
    hbm_gib: float | None = None
    """GiB of device memory a rank; required for cuda, null for cpu."""
    ddr_gib: float = 128.0
    """GiB of host memory a rank: all there is for cpu; for cuda, room for the fused_uvm kernels."""
    rates: Rates | None = None
    """What the planner compares placements by; null takes those of the known GPU whose memory is nearest."""
    calibration: str = ""
    """How the rates were measured; empty for peaks by data sheet."""

    def __post_init__(self) -> None:
        if self.world_size < 1 or self.local_world_size < 1 or self.world_size % self.local_world_size:
            raise ValueError(
                f"world_size={self.world_size} must be a positive multiple of "
                f"local_world_size={self.local_world_size}: every node runs the same number of ranks"
            )
        if self.world_size > MOST_RANKS:
            raise ValueError(f"world_size={self.world_size} must be at most {MOST_RANKS:,}, which is no cluster")
        if not self.local_world_size <= self.node_ranks <= MOST_RANKS:
            raise ValueError(
                f"whole_node={self.whole_node} must be null, or local_world_size={self.local_world_size} at least"
            )
        if not 1 <= self.racks <= self.num_nodes:
            raise ValueError(f"racks={self.racks} must be between 1 and the number of nodes, {self.num_nodes}")
        if self.compute_device not in ("cuda", "cpu"):
            raise ValueError(f"compute_device must be cuda or cpu, got {self.compute_device!r}")
        if (self.compute_device == "cuda") != (self.hbm_gib is not None):
            raise ValueError(f"hbm_gib={self.hbm_gib} on {self.compute_device}: cuda needs it, and a cpu has none")
        if not (0 < self.memory_gib <= MOST_GIB and 0 < self.ddr_gib <= MOST_GIB):
            raise ValueError(
                f"memory must be a number of GiB above 0 and at most 2^33, got hbm_gib={self.hbm_gib}, "
                f"ddr_gib={self.ddr_gib}"
            )
        if not self.calibration.isprintable():
            raise ValueError(f"calibration must be printable text of one line, got {self.calibration!r}")

    @property
    def num_nodes(self) -> int:
        """Nodes, each with as many of the ranks."""
        return self.world_size // self.local_world_size

    def larger(self, ranks: int) -> "Machine":
        """This machine with another number of ranks, on whole nodes."""
        return replace(self, world_size=ranks, local_world_size=self.node_ranks, whole_node=None)

    @property
    def node_ranks(self) -> int:
        """Ranks of a whole node."""
        return self.local_world_size if self.whole_node is None else self.whole_node

    @property
    def memory_gib(self) -> float:
        """GiB a rank of the memory where the fused kernel keeps tables."""
        return self.ddr_gib if self.hbm_gib is None else self.hbm_gib

    @property
    def nearest_gpu(self) -> str | None:
        """The known GPU whose memory is nearest; its bandwidths stand in for this machine's.  None for a cpu."""
        return None if self.hbm_gib is None else _nearest_gpu(self.hbm_gib)

    @property
    def effective_rates(self) -> Rates:
        """What the planner compares placements by."""
        if self.rates is not None:
            return self.rates
        name = self.nearest_gpu
        return CPU_RATES if name is None else GPUS[name].rates

    @property
    def network_rate(self) -> float:
        """GB/s of a rank to other nodes: where there are several racks, across them."""
        rates = self.effective_rates
        return rates.across_racks if self.racks > 1 and rates.across_racks else rates.across_nodes

    @property
    def exchange_rate(self) -> float:
        """GB/s of a rank in an exchange among all: that of the slowest link in it.  One rank exchanges nothing."""
        if self.world_size == 1:
            return math.inf
        return self.network_rate if self.world_size > self.local_world_size else self.effective_rates.within_node

    def describe(self) -> str:
        """One line for reports and errors."""
        like = f", bandwidths of {self.nearest_gpu}" if self.nearest_gpu and self.rates is None else ""
        racks = f", {self.racks} racks" if self.racks > 1 else ""
        like = f", rates {self.calibration}" if self.calibration else like
        return (
            f"{self.world_size} {self.compute_device} ranks ({self.num_nodes} x {self.local_world_size}{racks}), "
            f"{self.memory_gib:g} GiB each{like}"
        )


@lru_cache
def _nearest_gpu(memory_gib: float) -> str:
    return min(GPUS, key=lambda name: abs(GPUS[name].hbm_gib - memory_gib))


def cluster(node: NodeType, ranks: int) -> Machine:
    """So many ranks on nodes of one type; fewer than a node has GPUs are a part of one.

    Raises:
        ValueError: the node has no GPU, or the ranks are no whole number of nodes.
    """
    if not node.gpus:
        raise ValueError("clusters are planned for nodes with GPUs, and this type has none")
    return Machine(
        world_size=ranks,
        local_world_size=min(ranks, node.gpus),
        whole_node=node.gpus if ranks < node.gpus else None,
        compute_device="cuda",
        hbm_gib=node.hbm_gib,
        ddr_gib=node.host_gib / node.gpus,
        rates=node.rates,
        calibration=node.calibration,
    )
