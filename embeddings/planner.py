"""Plan where tables go, for any number of ranks, without a GPU or a process group.

The plan is a pure function of the arguments, so every rank of a job may make it for itself.
"""

from collections.abc import Sequence

from torch import nn
from torchrec.modules.embedding_modules import EmbeddingCollection

from embeddings.config import PlacementConfig, SparseOptimizerConfig, TableConfig
from embeddings.machine import Machine
from embeddings.plan import Plan
from embeddings.planning.problem import BatchLoad, Problem, reserve
from embeddings.planning.solver import solve

DENSE_COPIES = 5
"""Float32 copies of each dense parameter: itself, its gradient, the sum of that over ranks, Adam's two moments."""


def plan_tables(
    model: nn.Module,
    tables: Sequence[TableConfig],
    *,
    machine: Machine,
    placement: PlacementConfig,
    optimizer: SparseOptimizerConfig,
    load: BatchLoad,
) -> Plan:
    """The best placement of `tables` found on `machine`.  `model` (meta device is enough) tells the dense memory.

    Raises:
        ValueError: the tables do not fit (the message says what is needed and what would help), or a wrong constraint.
    """
    return solve(problem_of(model, tables, machine=machine, placement=placement, optimizer=optimizer, load=load))


def problem_of(
    model: nn.Module,
    tables: Sequence[TableConfig],
    *,
    machine: Machine,
    placement: PlacementConfig,
    optimizer: SparseOptimizerConfig,
    load: BatchLoad,
    activation_bytes: int = 0,
) -> Problem:
    """What `plan_tables` solves, and what a plan from a file is checked against.

    `activation_bytes` of a rank are what `model` holds in a backward pass, counted by whoever knows its lengths.

    Raises:
        ValueError: a constraint of an unknown table, or an optimizer that the machine does not have.
    """
    return Problem(
        tables=tuple(tables),
        machine=machine,
        placement=placement,
        optimizer=optimizer,
        load=load,
        reservation=reserve(
            machine, placement, dense_bytes=dense_bytes(model), activation_bytes=activation_bytes, tables=tables
        ),
    )


def dense_bytes(model: nn.Module) -> int:
    """Bytes a rank for the replicated part of `model` while it trains; everything but its tables."""
    sparse = {
        parameter
        for module in model.modules()
        if isinstance(module, EmbeddingCollection)
        for parameter in module.parameters()
    }
    return sum(DENSE_COPIES * 4 * parameter.numel() for parameter in model.parameters() if parameter not in sparse)
