"""Would it pay to replicate a table's hottest rows and shard the rest?  By the planner's own estimates, without a run.

Run: python -m benchmarks.hot_rows [--rows 10000000] [--dim 128] [--ids 131072] [--skew 1.05] [--machine h100-8]
     [--ranks 8 64 512] [--group-ms 0.06] [--json FILE]

One table with ids by Zipf's law.  For each number of ranks: row-wise with all ids sent, with each of a rank's distinct
ids sent once, and the best number of hottest rows replicated beside either for the rest.  Nothing trains so: the
figures say whether it would be worth building.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from embeddings.config import ExchangeConfig, TableConfig
from embeddings.hardware import node_type
from embeddings.kinds.kind import Work
from embeddings.kinds.registry import KINDS
from embeddings.machine import Machine, cluster

Numbers = npt.NDArray[np.float64]

BINS = 4000
"""Bins of neighbouring rows that count as equally hot, narrow where rows are hot."""


def main() -> None:
    """Prints and writes a row for each number of ranks."""
    parser = argparse.ArgumentParser(description="Hot rows replicated, by estimates.")
    for name, default in (("rows", 10_000_000), ("dim", 128), ("ids", 131_072)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--skew", type=float, default=1.05, help="exponent of Zipf's law")
    parser.add_argument("--machine", default="h100-8")
    parser.add_argument("--ranks", type=int, nargs="*", default=[8, 64, 512])
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/hot_rows.json"))
    parser.add_argument("--group-ms", type=float, help="fixed time of a lookup group; default: the machine's")
    arguments = parser.parse_args()
    node = node_type(arguments.machine)
    if arguments.group_ms is not None:
        node = replace(node, rates=replace(node.rates, lookup_group_ms=arguments.group_ms))
    table = TableConfig(
        name="item", num_embeddings=arguments.rows, embedding_dim=arguments.dim, features=("item",), dtype="float32"
    )
    ends, parts = zipf(arguments.rows, arguments.skew)
    found = {ranks: estimates(table, cluster(node, ranks), arguments.ids, ends, parts) for ranks in arguments.ranks}
    for ranks, row in found.items():
        print(f"{ranks:5} ranks: " + ", ".join(f"{name} {value:.4g}" for name, value in row.items()))
    settings = {name: value for name, value in vars(arguments).items() if name not in ("json", "ranks")}
    arguments.json.write_text(json.dumps(settings | {"ranks": found}, indent=1) + "\n", encoding="utf-8")


def zipf(rows: int, skew: float) -> tuple[Numbers, Numbers]:
    """[bins] the row after each bin's last, hottest first, and the part of all lookups that a row of the bin has."""
    ends = np.unique(np.round(np.geomspace(1, rows, BINS)))
    middles = (np.concatenate([[0], ends[:-1]]) + ends + 1) / 2
    weights = middles**-skew
    sizes = np.diff(ends, prepend=0)
    return ends, weights / (weights * sizes).sum()


def estimates(table: TableConfig, machine: Machine, ids: int, ends: Numbers, parts: Numbers) -> dict[str, float]:
    """Milliseconds of a step each way, and the rows replicated beside all others in full."""
    sizes = np.diff(ends, prepend=0)
    seen = sizes * -np.expm1(ids * np.log1p(-np.minimum(parts, 1 - 1e-12)))
    distinct, looked_up = np.cumsum(seen), np.cumsum(sizes * parts)
    in_full = sharded_ms(table, machine, ids, ids, ExchangeConfig())
    once = sharded_ms(table, machine, ids, distinct[-1], ExchangeConfig(deduplicate=True))
    # Two groups of lookups where there was one.
    group_ms = machine.effective_rates.lookup_group_ms
    with_once, with_full = [(once, 0.0)], [(in_full, 0.0)]
    for index in range(len(ends) - 1):
        hot, rest = looked_up[index], ids * (1 - looked_up[index])
        ms = replicated_ms(table, machine, int(ends[index]), ids * hot) + group_ms
        cold = distinct[-1] - distinct[index]
        with_once.append((ms + sharded_ms(table, machine, rest, cold, ExchangeConfig(deduplicate=True)), ends[index]))
        with_full.append((ms + sharded_ms(table, machine, rest, rest, ExchangeConfig()), ends[index]))
    return {
        "distinct_part": float(distinct[-1] / ids),
        "in_full_ms": in_full,
        "each_id_once_ms": once,
        "hot_rows_and_in_full_ms": float(min(with_full)[0]),
        "hot_rows_and_each_id_once_ms": float(min(with_once)[0]),
        "hot_rows": float(min(with_full)[1]),
    }


def sharded_ms(table: TableConfig, machine: Machine, ids: float, sent: float, exchange: ExchangeConfig) -> float:
    """Row-wise, with so many of the ids sent."""
    return _kind_ms("row_wise", table, machine, ids, sent=sent, exchange=exchange)


def replicated_ms(table: TableConfig, machine: Machine, rows: int, ids: float) -> float:
    """So many rows on every rank."""
    hot = TableConfig(name="hot", num_embeddings=rows, embedding_dim=table.embedding_dim, features=("hot",))
    return _kind_ms("replicated", hot, machine, ids, sent=ids, exchange=ExchangeConfig())


def _kind_ms(
    name: str, table: TableConfig, machine: Machine, ids: float, *, sent: float, exchange: ExchangeConfig
) -> float:
    work = Work(
        table=table,
        optimizer="rowwise_adagrad",
        kernel="fused",
        machine=machine,
        ids=ids,
        exchanged_ids=sent,
        exchange=exchange,
    )
    kind = KINDS[name]
    return kind.cost(work, kind.cuts(table, machine)[0][0]).ms


if __name__ == "__main__":
    main()
