"""Which clusters hold and serve some tables, how fast and for how much: planned one by one, without a GPU or data."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from embeddings.hardware import NodeType, node_type, read_object
from embeddings.machine import Machine, cluster
from embeddings.plan import Plan
from embeddings.planning.demand import Demand
from embeddings.planning.problem import DoesNotFit, Problem, reserve
from embeddings.planning.solver import solve

HOURS_OF_A_DAY = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class Copies:
    """2D: groups of ranks that each hold all sharded tables and exchange rows among themselves alone.

    Rows and optimizer state of the groups are averaged now and then, as TorchRec's DMPCollection does.  That is another
    training: between two averages a group sees its own samples' updates alone, as if its part of the batch were all.
    """

    number: int = 1
    """Groups; 1 is one table, as `train` has it."""
    averaged_every: int = 100
    """Steps from one average to the next."""

    def __post_init__(self) -> None:
        if self.number < 1 or self.averaged_every < 1:
            raise ValueError(
                f"copies and the steps between their averages must be at least 1, got {self.number} and "
                f"{self.averaged_every}"
            )

    def group(self, machine: Machine) -> Machine:
        """The ranks that hold one copy.

        Raises:
            ValueError: the groups would be no whole nodes, and no equal parts of one either.
        """
        ranks, node = machine.world_size // self.number, machine.local_world_size
        if machine.world_size % self.number or (ranks % node if ranks > node else node % ranks):
            raise ValueError(
                f"{machine.world_size} ranks on nodes of {node} cannot hold {self.number} copies: groups must be whole "
                "nodes or equal parts of one"
            )
        return replace(machine, world_size=ranks, local_world_size=min(ranks, node), racks=1)

    def averaging_ms(self, plan: Plan, machine: Machine) -> float:
        """What averaging the fullest rank's rows and state takes of each step, by a ring over the groups."""
        rate = (
            machine.network_rate
            if machine.world_size > machine.local_world_size
            else machine.effective_rates.within_node
        )
        held = max(rank.weight_bytes + rank.optimizer_bytes for rank in plan.ranks)
        return 2 * (self.number - 1) / self.number * held / (rate * 1e6) / self.averaged_every


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """What one cluster would do: one answer to the question which to take."""

    node: str
    """Name of the node type."""
    ranks: int
    """GPUs of the cluster."""
    copies: int
    """Groups of them that hold all tables."""
    plan: Plan | None
    """The best plan found, of one group; None if the tables do not fit."""
    problem: str
    """Why there is no plan, in one line; empty if there is one."""
    step_ms: float
    """Tables, dense model and the average of copies; infinite if nothing fits."""
    samples_per_s: float
    """Samples that all ranks train on a second."""
    hours: float
    """For a day's samples; infinite if nothing fits."""
    gpu_hours: float
    """GPU hours for a day's samples: `hours` times the number of GPUs."""
    price: float | None
    """What the nodes cost in these hours, whole ones; None where the node has no price."""

    @property
    def keeps_up(self) -> bool:
        """Whether it trains a day's samples within a day."""
        return self.hours <= HOURS_OF_A_DAY


def read_nodes(names: Sequence[str]) -> dict[str, NodeType]:
    """Node types by name: known ones, and files that hold the fields of a `NodeType`.

    Raises:
        ValueError: neither a known name nor a file, a wrong file, a node without GPUs, or two of one name.
    """
    nodes: dict[str, NodeType] = {}
    for name in map(str.strip, names):
        node, known_as = node_type(name), Path(name).stem if name.endswith(".json") else name
        if known_as in nodes or node in nodes.values():
            raise ValueError(
                f"--machines names {name!r} twice, or two machines alike: leave one out, or rename its file"
            )
        if not node.gpus:
            raise ValueError(f"clusters are planned for nodes with GPUs, which {name} has none of")
        nodes[known_as] = node
    return nodes


def read_prices(path: Path, nodes: Collection[str]) -> dict[str, float]:
    """Price of an hour of a whole node, by its name.

    Raises:
        ValueError: it cannot be read, a price is no positive number or of none of the nodes, or a node has none.
    """
    prices = read_object(path)
    unknown = sorted(set(prices) - set(nodes))
    if unknown:
        raise ValueError(f"{path}: {unknown[0]!r} is none of --machines, which are {', '.join(nodes)}")
    missing = [name for name in nodes if name not in prices]
    if missing:
        raise ValueError(f"{path} has no price of {missing[0]!r}: clusters are compared by price only if all have one")
    wrong = [name for name, price in prices.items() if type(price) not in (int, float) or not 0 < price < math.inf]
    if wrong:
        raise ValueError(f"{path}: the price of {wrong[0]!r} must be a number above 0, got {prices[wrong[0]]!r}")
    return dict(prices)


def rank_numbers(text: str) -> list[int]:
    """`8..512` as 8, 16, 32, ... 512; `24` as 24.

    Raises:
        ValueError: it is neither.
    """
    first, dots, last = text.partition("..")
    whole = all(number.isascii() and number.isdigit() for number in ([first, last] if dots else [first]))
    if not whole or int(first) < 1 or (dots and int(last) < int(first)):
        raise ValueError(f"--ranks must be a number or FIRST..LAST, got {text!r}")
    numbers = [int(first)]
    while dots and numbers[-1] * 2 <= int(last):
        numbers.append(numbers[-1] * 2)
    return numbers


def clusters(
    demand: Demand,
    nodes: Mapping[str, NodeType],
    ranks: Sequence[int],
    *,
    samples: float,
    prices: Mapping[str, float],
    copies: Sequence[Copies] = (Copies(),),
    begin: Callable[[str], None] = lambda _: None,
) -> list[Cluster]:
    """Every number of ranks on every type of node, planned with each number of copies for so many samples a day;
    `begin` is told of each before.

    Raises:
        ValueError: a number of ranks that is no multiple of a node's GPUs or of the copies, or a setting that no
            cluster can have.
    """
    if any(each.number > 1 for each in copies) and demand.placement.compute_kernels != ("fused",):
        raise ValueError("copies are planned for rows in device memory alone: leave compute_kernels out of the tables")
    asked: list[tuple[tuple[str, NodeType], Machine, Copies]] = []
    for name, node in nodes.items():
        demand.dense_ms_on(name, node)
        for number in ranks:
            if number > node.gpus and number % node.gpus:
                raise ValueError(f"{number} ranks are no whole number of nodes {name}, which have {node.gpus} GPUs")
            asked += [((name, node), cluster(node, number), each) for each in copies]
    # Planning may take minutes: what is wrong is said before.
    for _, machine, each in asked:
        each.group(machine)
    found: list[Cluster] = []
    for named, machine, each in asked:
        begin(f"planning {len(found) + 1} of {len(asked)}: {named[0]}, {machine.world_size} ranks")
        node_price = prices.get(named[0])
        found.append(_cluster(demand, named, machine, each, samples=samples, node_price=node_price))
    return found


def cheapest(found: Sequence[Cluster]) -> Cluster | None:
    """The cluster with one copy of the tables, as `train` has them, that keeps up and costs least, the smaller of two
    that cost the same; None if none keeps up."""
    cost = _cost(found)
    keeping_up = [cluster for cluster in found if cluster.keeps_up and cluster.copies == 1]
    return min(keeping_up, key=lambda cluster: (float(f"{cost(cluster):.3g}"), cluster.ranks), default=None)


def _cost(found: Sequence[Cluster]) -> Callable[[Cluster], float]:
    """What clusters are compared by: price where all have one, else GPU-hours."""
    priced = all(cluster.price is not None for cluster in found)
    return lambda cluster: cluster.price if priced and cluster.price is not None else cluster.gpu_hours


def pareto(found: Sequence[Cluster]) -> list[Cluster]:
    """The clusters that keep up and than which none is both faster and takes less."""
    cost = _cost(found)
    fitting = [cluster for cluster in found if cluster.keeps_up]
    return [
        cluster
        for cluster in fitting
        if not any(
            other.samples_per_s >= cluster.samples_per_s
            and cost(other) <= cost(cluster)
            and (other.samples_per_s, -cost(other)) != (cluster.samples_per_s, -cost(cluster))
            for other in fitting
        )
    ]


def _cluster(
    demand: Demand,
    named: tuple[str, NodeType],
    machine: Machine,
    copies: Copies,
    *,
    samples: float,
    node_price: float | None,
) -> Cluster:
    (name, node), ranks, group = named, machine.world_size, copies.group(machine)
    problem = Problem(
        tables=demand.tables,
        machine=group,
        placement=demand.placement,
        optimizer=demand.optimizer,
        load=demand.load,
        reservation=reserve(group, demand.placement, dense_bytes=demand.dense_bytes, tables=demand.tables),
    )
    plan, reason = None, ""
    try:
        plan = solve(problem)
    except DoesNotFit as error:
        # In a file of tables these settings have no "placement." in front.
        reason = str(error).replace("placement.", "")
        if copies.number > 1:
            # Fixes are planned for the ranks of one copy, and among all kernels.
            reason = f"each of {copies.number} copies: {reason.split('; fixes: ')[0]}"
    step_ms = math.inf
    if plan is not None:
        step_ms = plan.step_ms + demand.dense_ms_on(name, node) + copies.averaging_ms(plan, machine)
    samples_per_s = ranks * demand.load.samples_per_rank / step_ms * 1000
    hours = samples / samples_per_s / 3600 if plan is not None else math.inf
    return Cluster(
        node=name,
        ranks=ranks,
        copies=copies.number,
        plan=plan,
        problem=reason,
        step_ms=step_ms,
        samples_per_s=samples_per_s,
        hours=hours,
        gpu_hours=hours * ranks,
        price=None if node_price is None else hours * math.ceil(ranks / node.gpus) * node_price,
    )
