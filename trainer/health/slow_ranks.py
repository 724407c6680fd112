"""Which rank will the others wait for?  Every rank times a product and exchanges with its neighbours before the first
step, and one that takes longer than the others is named with its machine: a throttled GPU, a bad cable, a slow card.
"""

import logging
import socket
import time
from collections.abc import Sequence
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.parallel.mesh import Mesh

logger = logging.getLogger(__name__)

COLLECTIVE_MIB = {"cuda": 256, "cpu": 4}
"""What the ranks add up."""
EXCHANGE_MIB = {"cuda": 64, "cpu": 1}
"""What two neighbours send each other."""
SLOW = {"cuda": 1.3, "cpu": 4.0}
"""Times the median at which a rank counts as slow; higher on a CPU, where other processes' work disturbs."""
REPEATS = 3


def check_ranks(mesh: Mesh) -> None:
    """Time every rank's product, exchanges and the first all-reduce; log the figures once and name the slow ranks.
    Called by every rank.

    An all-reduce goes at the pace of its slowest rank and does not tell which that is; exchanges in pairs do.
    """
    sent = EXCHANGE_MIB[mesh.device.type]
    mine = {
        "a product": _product_ms(mesh.device) if mesh.device.type == "cuda" else 0.0,
        f"an exchange of {sent} MiB within its node": exchange_ms(mesh, mesh.ranks_of_node),
        f"an exchange of {sent} MiB with other nodes": exchange_ms(mesh, mesh.ranks_across_nodes),
    }
    ranks = [(socket.gethostname(), mine)] * mesh.world_size
    dist.all_gather_object(ranks, (socket.gethostname(), mine))  # every rank
    rate = _collective_rate(mesh)
    if not mesh.is_first:
        return
    figures = []
    if mesh.world_size > 1:
        size = COLLECTIVE_MIB[mesh.device.type]
        figures.append(f"all-reduce of {size} MiB over {mesh.world_size} ranks: {rate:.2f} GB/s")
    for what in mine:
        times = [(host, found[what]) for host, found in ranks]
        middle = median(ms for _, ms in times)
        figures += [f"{what}: {middle:.2f} ms"] if middle else []
        for words in slow_ranks(what, times, SLOW[mesh.device.type]):
            logger.warning("%s", words)
    if figures:
        logger.info("%s", "; ".join(figures))


def slow_ranks(what: str, ranks: Sequence[tuple[str, float]], factor: float) -> list[str]:
    """Ranks, each with its host and the ms that it took, that take `factor` times the median or more."""
    middle = median(ms for _, ms in ranks)
    return [
        f"rank {rank} on {host} takes {ms:.2f} ms for {what}, the median rank {middle:.2f}: all wait for it"
        for rank, (host, ms) in enumerate(ranks)
        if middle > 0 and ms >= factor * middle
    ]


def exchange_ms(mesh: Mesh, ring: Sequence[int]) -> float:
    """The faster of this rank's exchanges with its two neighbours in a ring of ranks; 0 in a ring of one.

    A slow rank has two slow neighbours by this measure, but each of them has another that is not.  Called by every
    rank, each with a ring of the same length that it is in.
    """
    best, place = 0.0, ring.index(mesh.rank)
    for pairs in rounds(len(ring)):
        partner = next((ring[a + b - place] for a, b in pairs if place in (a, b)), None)
        dist.barrier()  # every rank
        if partner is not None:
            ms = min(_exchange_ms(mesh.device, partner) for _ in range(1 + REPEATS))
            best = min(best or ms, ms)
    return best


def rounds(length: int) -> list[list[tuple[int, int]]]:
    """Every pair of neighbours in a ring, by when they exchange: no member is in two pairs of a round."""
    pairs = [(place, (place + 1) % length) for place in range(length if length > 2 else length - 1)]
    # In a ring of odd length the last pair has a neighbour in each of the other two rounds.
    last = [pairs.pop()] if length % 2 and pairs else []
    return [found for found in (pairs[::2], pairs[1::2], last) if found]


def _exchange_ms(device: torch.device, partner: int) -> float:
    """Sending to and receiving from a rank at the same time; the first one sets up the connection."""
    size = EXCHANGE_MIB[device.type] * 2**20
    sent, received = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    _synchronize(device)
    started = time.perf_counter()
    _exchange(sent, received, partner)
    _synchronize(device)
    return (time.perf_counter() - started) * 1e3


def _exchange(sent: Tensor, received: Tensor, partner: int) -> None:
    both = [dist.P2POp(dist.isend, sent, partner), dist.P2POp(dist.irecv, received, partner)]
    for work in dist.batch_isend_irecv(both):
        work.wait()


def _collective_rate(mesh: Mesh) -> float:
    """GB/s of an all-reduce over all ranks."""
    num_bytes = COLLECTIVE_MIB[mesh.device.type] * 2**20
    x = torch.zeros(num_bytes // 4, device=mesh.device)
    dist.all_reduce(x)  # every rank; the first one sets up connections
    started = time.perf_counter()
    dist.all_reduce(x)
    total = x.sum().item()  # waits for the device
    assert total == 0, "a sum of zeros"
    return num_bytes / (time.perf_counter() - started) / 1e9


def _product_ms(device: torch.device) -> float:
    """A square product in bfloat16, the best of a few."""
    a = torch.ones(4096, 4096, dtype=torch.bfloat16, device=device)
    times = []
    for _ in range(5):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        torch.mm(a, a)
        torch.cuda.synchronize(device)
        times.append((time.perf_counter() - started) * 1e3)
    return min(times)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
