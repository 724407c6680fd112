"""Answers of capacity planning as text and as one self-contained page with bars a rank."""

import html
from collections.abc import Sequence

from embeddings.capacity import Cluster, pareto
from embeddings.plan import Plan, size_text
from embeddings.report import columns

_STYLE = """body{font:14px system-ui,sans-serif;margin:2em auto;max-width:70em;color:#222}
table{border-collapse:collapse}
td,th{padding:.3em .8em;text-align:right;border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}
.best{background:#e8f4e8}.bars{display:flex;align-items:flex-end;height:8em;gap:1px;border-bottom:1px solid #999}
.bars div{flex:1;display:flex;flex-direction:column-reverse;height:100%}.bars span{display:block}
.w{background:#4878a8}.o{background:#88aacc}.b{background:#d8a860}p.no{color:#a33}"""

_OF_COPIES = (
    "Copies train otherwise than one table: each group of ranks updates its own rows from its own samples, as if its "
    "part of the batch were all, and rows and optimizer state of the groups are averaged now and then. `train` has one "
    "copy."
)

MAX_BARS = 256
"""Ranks drawn; with more ranks, evenly spaced ones of them."""


def capacity_text(found: Sequence[Cluster]) -> str:
    """A line a cluster; a star marks those than which none is both faster and cheaper."""
    best = pareto(found)
    rows = [["", *_heads()]]
    rows += [["*" if cluster in best else "", *_cells(cluster)] for cluster in found]
    return columns(rows) + (f"\n{_OF_COPIES}" if any(cluster.copies > 1 for cluster in found) else "")


def capacity_page(found: Sequence[Cluster]) -> str:
    """The table, and of every cluster each rank's memory or what is missing."""
    best = pareto(found)
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in _heads())
    body = "".join(
        f"<tr{' class=best' if cluster in best else ''}>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(cluster))
        + "</tr>"
        for cluster in found
    )
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Clusters for these tables</title>",
        f"<style>{_STYLE}</style><h1>Clusters for these tables</h1>",
        "<p>Estimates from peak bandwidths. Green: none is both faster and cheaper. Bars: a rank's rows, optimizer "
        "state and buffers, of the memory that there is for tables.</p>",
        f"<table><tr>{head}</tr>{body}</table>",
        *([f"<p>{html.escape(_OF_COPIES)}</p>"] if any(cluster.copies > 1 for cluster in found) else []),
    ]
    for cluster in found:
        of_copies = f", {cluster.copies} copies" if cluster.copies > 1 else ""
        parts.append(f"<h2>{html.escape(cluster.node)}, {cluster.ranks} ranks{of_copies}</h2>")
        if cluster.plan is None:
            parts.append(f"<p class=no>{html.escape(cluster.problem)}</p>")
        else:
            parts.append(_bars(cluster.plan))
    return "\n".join(parts) + "\n"


def _heads() -> list[str]:
    return ["nodes", "ranks", "copies", "step ms", "samples/s", "fullest rank", "of", "GPU-hours", "price"]


def _cells(cluster: Cluster) -> list[str]:
    if cluster.plan is None:
        return [cluster.node, str(cluster.ranks), str(cluster.copies), "does not fit", "-", "-", "-", "-", "-"]
    fullest = max(rank.memory_bytes for rank in cluster.plan.ranks)
    return [
        cluster.node,
        str(cluster.ranks),
        str(cluster.copies),
        f"{cluster.step_ms:.3g}",
        f"{cluster.samples_per_s:,.0f}",
        size_text(fullest),
        size_text(cluster.plan.available_bytes),
        f"{cluster.gpu_hours:.3g}",
        "-" if cluster.price is None else f"{cluster.price:,.2f}",
    ]


def _bars(plan: Plan) -> str:
    step = -(-len(plan.ranks) // MAX_BARS)
    bars = []
    for rank in range(0, len(plan.ranks), step):
        estimate = plan.ranks[rank]
        parts = (("w", estimate.weight_bytes), ("o", estimate.optimizer_bytes), ("b", estimate.io_bytes))
        spans = "".join(
            f'<span class={kind} style="height:{100 * size / plan.available_bytes:.2f}%"></span>'
            for kind, size in parts
        )
        bars.append(f'<div title="rank {rank}: {size_text(estimate.memory_bytes)}">{spans}</div>')
    kinds: dict[str, int] = {}
    for table in plan.tables.values():
        kinds[table.sharding_type] = kinds.get(table.sharding_type, 0) + 1
    said = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return f"<p>{said}; {plan.step_ms:.3g} ms of tables a step</p><div class=bars>{''.join(bars)}</div>"
