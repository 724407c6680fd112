"""Which clusters hold and serve some tables, how fast and for how much: planned one by one, without a GPU or data.

The tables come from a file:

    {"tables": [{"name": "item", "num_embeddings": 1000000000, "embedding_dim": 128, "ids_per_sample": 4096.0},
                {"name": "tag", "num_embeddings": 100000, "embedding_dim": 32, "ids_per_sample": 40960.0,
                 "pooled": "event", "bags_per_sample": 4096.0},
                {"name": "city", "num_embeddings": 10000, "embedding_dim": 16, "dtype": "float16",
                 "optimizer": {"kind": "sgd", "learning_rate": 0.1}}],
     "samples_per_rank": 32, "dense_gib": 1.5, "activation_gib": 20.0, "dense_ms": 40.0,
     "compute_kernels": ["fused", "fused_uvm_caching"]}

All but `tables` may be left out.  `dense_gib` is the dense model's memory for parameters, gradients and Adam;
`dense_ms` its time a step, as a run measured it, which is added to the tables' time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embeddings.config import PlacementConfig, SparseOptimizerConfig, TableConfig, UnboundedConfig
from embeddings.hardware import NodeType, node_type, read_object
from embeddings.machine import cluster
from embeddings.plan import Plan
from embeddings.planning import solve
from embeddings.problem import GIB, BatchLoad, Problem, reserve


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """What is to be trained."""

    tables: tuple[TableConfig, ...]
    """The tables."""
    load: BatchLoad
    """The lookups of a step, the same a rank on any cluster."""
    placement: PlacementConfig
    """What may be chosen."""
    optimizer: SparseOptimizerConfig
    """Of the tables without one of their own."""
    dense_bytes: int
    """Memory a rank for the dense model."""
    dense_ms: float
    """Its time a step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """One answer."""

    node: str
    """Name of the node type."""
    ranks: int
    """GPUs."""
    plan: Plan | None
    """The best plan found; None if the tables do not fit."""
    problem: str
    """Why there is no plan, in one line; empty if there is one."""
    step_ms: float
    """Tables and dense model; infinite if nothing fits."""
    samples_per_s: float
    """Of all ranks."""
    gpu_hours: float
    """For the samples that were asked for; for a million without such a number."""
    price: float | None
    """Of these hours; None without a price of the node."""


def read_demand(path: Path) -> Demand:
    """The tables of a file.

    Raises:
        ValueError: it cannot be read, or a key or value in it is wrong; one line.
    """
    values = read_object(path)
    try:
        return _demand(dict(values))
    except (KeyError, TypeError, ValueError) as error:
        what = f"misses the key {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}: {what}") from error


def read_nodes(names: Sequence[str]) -> dict[str, NodeType]:
    """Node types by name: known ones, and files that hold the fields of a `NodeType`.

    Raises:
        ValueError: neither a known name nor a file, or a wrong file.
    """
    return {Path(name).stem if name.endswith(".json") else name: node_type(name) for name in names}


def read_prices(path: Path) -> dict[str, float]:
    """Price of an hour of a whole node, by its name.

    Raises:
        ValueError: it cannot be read, or a price is no positive number.
    """
    prices = read_object(path)
    wrong = [name for name, price in prices.items() if not isinstance(price, int | float) or not price > 0]
    if wrong:
        raise ValueError(f"{path}: the price of {wrong[0]!r} must be a number above 0, got {prices[wrong[0]]!r}")
    return dict(prices)


def rank_numbers(text: str) -> list[int]:
    """`8..512` as 8, 16, 32, ... 512; `24` as 24.

    Raises:
        ValueError: it is neither.
    """
    first, dots, last = text.partition("..")
    if not first.isdigit() or (dots and not last.isdigit()) or int(first) < 1 or (dots and int(last) < int(first)):
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
) -> list[Cluster]:
    """Every number of ranks on every type of node, planned.

    Raises:
        ValueError: a number of ranks that is no multiple of a node's GPUs, or a setting that no cluster can have.
    """
    found = []
    for name, node in nodes.items():
        for number in ranks:
            if number > node.gpus > 0 and number % node.gpus:
                raise ValueError(f"{number} ranks are no whole number of nodes {name}, which have {node.gpus} GPUs")
            found.append(_cluster(demand, name, node, number, samples, prices.get(name)))
    return found


def pareto(found: Sequence[Cluster]) -> list[Cluster]:
    """The clusters than which none is both faster and takes less: price where all have one, else GPU-hours."""
    priced = all(cluster.price is not None for cluster in found)

    def cost(cluster: Cluster) -> float:
        return cluster.price if priced and cluster.price is not None else cluster.gpu_hours

    fitting = [cluster for cluster in found if cluster.plan is not None]
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
    demand: Demand, name: str, node: NodeType, ranks: int, samples: float, node_price: float | None
) -> Cluster:
    machine = cluster(node, ranks)
    problem = Problem(
        tables=demand.tables,
        machine=machine,
        placement=demand.placement,
        optimizer=demand.optimizer,
        load=demand.load,
        reservation=reserve(machine, demand.placement, dense_bytes=demand.dense_bytes, tables=demand.tables),
    )
    plan, reason = None, ""
    try:
        plan = solve(problem)
    except ValueError as error:
        if "fit" not in str(error) and "no memory is left" not in str(error):
            raise
        reason = str(error)
    step_ms = float("inf") if plan is None else plan.step_ms + demand.dense_ms
    samples_per_s = ranks * demand.load.samples_per_rank / step_ms * 1000
    hours = samples / samples_per_s / 3600 * ranks if plan is not None else float("inf")
    return Cluster(
        node=name,
        ranks=ranks,
        plan=plan,
        problem=reason,
        step_ms=step_ms,
        samples_per_s=samples_per_s,
        gpu_hours=hours,
        price=None if node_price is None else hours / node.gpus * node_price,
    )


def _demand(values: dict[str, Any]) -> Demand:
    lookups: dict[str, float] = {}
    bags: dict[str, float] = {}
    tables = []
    for table in values.pop("tables"):
        fields = dict(table)
        features = tuple(fields.pop("features", (fields["name"],)))
        ids = float(fields.pop("ids_per_sample", len(features)))
        lookups |= dict.fromkeys(features, ids / len(features))
        bags |= dict.fromkeys(features, float(fields.pop("bags_per_sample", len(features))) / len(features))
        own = fields.pop("optimizer", None)
        optimizer = None if own is None else SparseOptimizerConfig(**own)
        maps = fields.pop("unbounded", None)
        unbounded = None if maps is None else UnboundedConfig(**maps)
        tables.append(TableConfig(features=features, optimizer=optimizer, unbounded=unbounded, **fields))
    demand = Demand(
        tables=tuple(tables),
        load=BatchLoad(
            samples_per_rank=values.pop("samples_per_rank", 64), ids_per_sample=lookups, bags_per_sample=bags
        ),
        placement=PlacementConfig(
            activation_gib=values.pop("activation_gib", 0.0),
            compute_kernels=tuple(values.pop("compute_kernels", ("fused",))),
        ),
        optimizer=SparseOptimizerConfig(**values.pop("optimizer", {})),
        dense_bytes=int(values.pop("dense_gib", 0.0) * GIB),
        dense_ms=float(values.pop("dense_ms", 0.0)),
    )
    if values:
        raise ValueError(f"unknown key {min(values)!r}")
    if not tables:
        raise ValueError("there must be at least one table")
    return demand
