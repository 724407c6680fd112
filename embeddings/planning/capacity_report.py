"""Answers of capacity planning as text and as one self-contained page with bars a rank."""

import html
from collections import Counter
from collections.abc import Sequence

from embeddings.plan import Plan, size_text
from embeddings.planning.capacity import Cluster, cheapest, pareto
from embeddings.planning.rank_bars import STYLE, rank_bars
from embeddings.planning.report import columns

_STYLE = """
:root{color-scheme:light dark;--ground:#fff;--text:#1d232b;--quiet:#5d6875;--line:#dfe3e8;--best:#e2f3e4;--no:#a33;
--c0:#3f74ab;--c1:#8fb4da;--c2:#d8a860}
@media (prefers-color-scheme:dark){:root{--ground:#15191f;--text:#e4e8ed;--quiet:#98a3b0;--line:#333b46;--best:#1d3a26;
--no:#f08a8a;--c0:#6ba3de;--c1:#3d6288;--c2:#c99545}}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}
body{font:15px/1.45 system-ui,sans-serif;max-width:70rem;margin:0 auto;padding:1rem 1rem 3rem;
background:var(--ground);color:var(--text)}
h1{font-size:1.5rem}.no{color:var(--no)}.answer{font-weight:600}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.28rem .7rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
td:first-child,th:first-child{text-align:left}th{color:var(--quiet)}.best{background:var(--best)}
details{margin:.8rem 0}summary{cursor:pointer;font-weight:600}"""

_OF_COPIES = (
    "Copies train otherwise than one table: each group of ranks updates its own rows from its own samples, as if its "
    "part of the batch were all, and rows and optimizer state of the groups are averaged now and then. `train` has one "
    "copy."
)


def capacity_text(found: Sequence[Cluster], samples: float) -> str:
    """A line a cluster, a star for those that keep up and than which none is both faster and cheaper; what nodes of
    which none will do lack; the answer."""
    best, answer = pareto(found), cheapest(found)
    marks = [">" if cluster is answer else "*" if cluster in best else "" for cluster in found]
    rows = [["", *_heads()], *([mark, *_cells(cluster)] for mark, cluster in zip(marks, found, strict=True))]
    lines = [columns(rows), *_lacking(found), _answer(found, samples)]
    return "\n".join(lines + ([_OF_COPIES] if any(cluster.copies > 1 for cluster in found) else []))


def _lacking(found: Sequence[Cluster]) -> list[str]:
    """A line for each type of node of which no number holds the tables: what the last one lacks."""
    last = {cluster.node: cluster for cluster in found}
    held = {cluster.node for cluster in found if cluster.plan is not None}
    return [f"{node}: {cluster.problem}" for node, cluster in last.items() if node not in held]


def capacity_page(found: Sequence[Cluster], samples: float) -> str:
    """The answer, the table, and of every cluster each rank's memory or what is missing."""
    best, answer = pareto(found), cheapest(found)
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in _heads())
    body = "".join(
        f"<tr{' class=answer' if cluster is answer else ' class=best' if cluster in best else ''}>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(cluster))
        + "</tr>"
        for cluster in found
    )
    rates = dict.fromkeys(_rates(cluster) for cluster in found)
    parts = [
        '<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">',
        f"<title>Clusters for these tables</title><style>{_STYLE}{STYLE}</style><h1>Clusters for these tables</h1>",
        f"<p class=answer>{html.escape(_answer(found, samples))}</p>",
        f"<div class=wide><table><tr>{head}</tr>{body}</table></div>",
        f"<p class=quiet>Estimates by {html.escape('; '.join(rates))}. Bold: the answer. Green: it keeps up, and none "
        "is both faster and cheaper.</p>",
        *([f"<p>{html.escape(_OF_COPIES)}</p>"] if any(cluster.copies > 1 for cluster in found) else []),
    ]
    for cluster in found:
        parts.append(f"<details{' open' if cluster in best or cluster is answer or cluster.plan is None else ''}>")
        of_copies = f", {cluster.copies} copies" if cluster.copies > 1 else ""
        parts.append(f"<summary>{html.escape(cluster.node)}, {cluster.ranks} ranks{of_copies}</summary>")
        if cluster.plan is None:
            parts.append(f"<p class=no>{html.escape(cluster.problem)}</p>")
        else:
            parts.append(_plan(cluster.plan))
        parts.append("</details>")
    return "\n".join(parts) + "\n"


def _answer(found: Sequence[Cluster], samples: float) -> str:
    """Which cluster to take, in one line."""
    best = cheapest(found)
    if best is not None:
        price = "" if best.price is None else f", {best.price:,.2f} a day"
        return (
            f"cheapest for {samples:,.0f} samples a day: {best.node}, {best.ranks} ranks, {best.hours:.3g} hours, "
            f"{best.gpu_hours:,.4g} GPU-hours{price}"
        )
    fitting = [cluster for cluster in found if cluster.plan is not None and cluster.copies == 1]
    if not fitting:
        return "none of these clusters holds one copy of the tables"
    fastest = min(fitting, key=lambda cluster: cluster.hours)
    return (
        f"none of these trains {samples:,.0f} samples a day: the fastest, {fastest.node} with {fastest.ranks} ranks, "
        f"takes {fastest.hours:.3g} hours for them: allow more ranks"
    )


def _rates(cluster: Cluster) -> str:
    measured = cluster.plan.machine.calibration if cluster.plan is not None else ""
    return f"rates of {cluster.node} {measured or 'as by data sheet'}"


def _heads() -> list[str]:
    return ["nodes", "ranks", "copies", "step ms", "samples/s", "fullest rank", "of", "hours", "GPU-hours", "price"]


def _cells(cluster: Cluster) -> list[str]:
    if cluster.plan is None:
        return [cluster.node, str(cluster.ranks), str(cluster.copies), "does not fit", *["-"] * 6]
    fullest = max(rank.memory_bytes for rank in cluster.plan.ranks)
    return [
        cluster.node,
        str(cluster.ranks),
        str(cluster.copies),
        f"{cluster.step_ms:.3g}",
        f"{cluster.samples_per_s:,.0f}",
        size_text(fullest),
        size_text(cluster.plan.available_bytes),
        f"{cluster.hours:.3g}" if cluster.keeps_up else f"{cluster.hours:.3g}, too slow",
        f"{cluster.gpu_hours:,.4g}",
        "-" if cluster.price is None else f"{cluster.price:,.2f}",
    ]


def _plan(plan: Plan) -> str:
    kinds = Counter(table.sharding_type for table in plan.tables.values())
    said = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    fullest = max(rank.memory_bytes for rank in plan.ranks)
    room = f"the fullest rank holds {size_text(fullest)} of the {size_text(plan.available_bytes)} that tables may use"
    return f"<p>{said}; {plan.step_ms:.3g} ms of tables a step; {room}</p>{rank_bars(plan)}"
