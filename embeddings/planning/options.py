"""Every allowed way to place each table, with what it costs."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

from embeddings.config import ComputeKernel, TableConfig
from embeddings.kinds.kind import Blocks, ShardCost, ShardingKind, Work
from embeddings.kinds.registry import KINDS, kind_named
from embeddings.planning.problem import DoesNotFit, Problem

MAX_COLUMNS = 1024
"""The most columns of a block that FBGEMM's kernels take on a GPU: up to 2,048 they look up zeros without a word
(TorchRec's issue 3673), and above that they fail."""

Group = tuple[int, str | None, str, str]
"""Width, what ids are summed into, sharding type and kernel: tables that share them share an exchange of ids, a kernel,
an exchange of rows."""


def cached_groups(groups: Collection[Group]) -> int:
    """How many of the groups have a cache."""
    return sum(kernel == "fused_uvm_caching" for *_, kernel in groups)


@dataclass(frozen=True)
class Option:
    """One way to place one table."""

    kind: ShardingKind
    """How the table is cut."""
    kernel: ComputeKernel
    """Which memory holds its rows."""
    width: int
    """Columns of the whole table."""
    pooled: str | None
    """How its rows are summed; None if they are not."""
    runs: tuple[tuple[int, ShardCost], ...]
    """(number of blocks, cost of each), block by block.  Of a kind that is everywhere they lie on ranks 0, 1, 2 ...
    in order, of one on a node on its ranks in order, otherwise each goes to a rank of choice."""

    @cached_property
    def pieces(self) -> tuple[ShardCost, ...]:
        """The blocks that go to a rank of choice."""
        return () if self.kind.everywhere else tuple(cost for count, cost in self.runs for _ in range(count))

    @property
    def largest(self) -> ShardCost:
        """The cost of the fullest block."""
        return self.runs[0][1]

    @cached_property
    def group(self) -> Group:
        """The tables that it is looked up with."""
        return self.width, self.pooled, self.kind.name, self.kernel

    @cached_property
    def total_bytes(self) -> tuple[int, int]:
        """Device memory and host memory of all blocks."""
        return (
            sum(count * cost.memory_bytes for count, cost in self.runs),
            sum(count * cost.host_bytes for count, cost in self.runs),
        )


def table_options(problem: Problem) -> list[list[Option]]:
    """Every allowed way to place each table, in the order of `problem.tables`.

    Raises:
        DoesNotFit: a table that this machine can have in no way that is allowed.
        ValueError: a sharding type that there is not or that a table with a constraint cannot have.
    """
    return [_options_of(table, problem) for table in problem.tables]


def placed_option(problem: Problem, table: TableConfig, kind: str, kernel: ComputeKernel, num_blocks: int) -> Option:
    """The option that a plan chose; `num_blocks` counts the blocks with a rank of choice.

    Raises:
        ValueError: the table cannot be placed so.
    """
    work = problem.work(table, kernel)
    found = kind_named(kind)
    refusal = _refusal(found, work)
    if refusal is not None:
        raise ValueError(f"table {table.name!r} cannot be {kind}: {refusal}")
    for cut in _cuts(found, work):
        if found.everywhere or sum(blocks.count for blocks in cut) == num_blocks:
            return _option(found, work, cut)
    raise ValueError(f"table {table.name!r} cannot be {kind} on {num_blocks} ranks")


def _options_of(table: TableConfig, problem: Problem) -> list[Option]:
    constraint = problem.placement.tables.get(table.name)
    own = constraint.sharding_types if constraint else None
    kernels = (constraint and constraint.compute_kernels) or problem.placement.compute_kernels
    types: Sequence[str] = own or problem.placement.sharding_types or tuple(KINDS)
    options: list[Option] = []
    refusals: dict[str, str] = {}
    for name in types:
        kind = kind_named(name)
        for kernel in kernels:
            work = problem.work(table, kernel)
            refusal = _refusal(kind, work)
            if refusal is not None:
                refusals.setdefault(name, refusal)
                continue
            options += [_option(kind, work, cut) for cut in _cuts(kind, work)]
    left = {option.kind.name for option in options}
    impossible = [name for name in types if name not in left]
    if impossible and own:
        name = impossible[0]
        raise ValueError(
            f"placement.tables allows table {table.name!r} to be {name}, which it cannot be: {refusals[name]}"
        )
    if not options:
        reasons = {why: [name for name in types if refusals[name] == why] for why in refusals.values()}
        said = "; ".join(f"{', '.join(names)}: {why}" for why, names in reasons.items())
        raise DoesNotFit(f"table {table.name!r} cannot be placed on {problem.machine.describe()}: {said}")
    return options


def _refusal(kind: ShardingKind, work: Work) -> str | None:
    refusal = _kernel_refusal(work) or kind.refusal(work)
    if refusal is None and not _cuts(kind, work):
        refusal = (
            f"FBGEMM's kernels on a GPU look up wrong values in rows of more than {MAX_COLUMNS} columns: take "
            "a narrower table, or several"
        )
    return refusal


def _cuts(kind: ShardingKind, work: Work) -> list[tuple[Blocks, ...]]:
    """The kind's ways to cut the table into blocks that the kernel can have."""
    cuts = kind.cuts(work.table, work.machine)
    if not kind.sharded or work.machine.compute_device == "cpu":
        return cuts
    return [cut for cut in cuts if all(blocks.num_columns <= MAX_COLUMNS for blocks in cut)]


def _kernel_refusal(work: Work) -> str | None:
    if work.machine.compute_device == "cpu" and work.kernel != "fused":
        return f"the kernel {work.kernel} needs a GPU, a cpu has only fused: add it"
    if work.table.unbounded is not None and work.kernel != "fused":
        return f"rows of unbounded ids begin anew where they lie, behind the back of {work.kernel}: allow fused"
    return None


def _option(kind: ShardingKind, work: Work, cut: tuple[Blocks, ...]) -> Option:
    return Option(
        kind=kind,
        kernel=work.kernel,
        width=work.table.embedding_dim,
        pooled=work.table.pooled,
        runs=tuple((blocks.count, kind.cost(work, blocks)) for blocks in cut),
    )
