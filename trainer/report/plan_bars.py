"""A sharding plan as bars a rank: memory by what it holds, and the estimated time of a step."""

from collections.abc import Callable, Sequence
from html import escape

from embeddings.planning.plan import Plan, RankEstimate, size_text
from trainer.report.tables import table

MAX_BARS = 256
"""Ranks drawn; with more, evenly spaced ones of them, and the fullest and the slowest are said in words."""

_WIDTH, _HEIGHT, _TOP, _BOTTOM = 460, 150, 8, 24
_MAX_BAR_WIDTH = 40

Part = tuple[str, Callable[[RankEstimate], float]]
"""What a part of a bar is called, and its size."""

_MEMORY: tuple[Part, ...] = (
    ("rows", lambda rank: rank.weight_bytes),
    ("optimizer state", lambda rank: rank.optimizer_bytes),
    ("buffers", lambda rank: rank.io_bytes),
)
_HOST: tuple[Part, ...] = (("rows and optimizer state in host memory", lambda rank: rank.host_bytes),)
_TIME: tuple[Part, ...] = (("lookups, updates and their communication", lambda rank: rank.step_ms),)


def plan_section(plan: Plan) -> str:
    """The bars of one plan, and where its tables are."""
    rows = [
        [
            name,
            f"{table.num_embeddings:,}",
            str(table.embedding_dim),
            size_text(table.weight_bytes),
            table.sharding_type,
            table.kernel,
            ", ".join(map(str, table.ranks)) or "all",
        ]
        for name, table in plan.tables.items()
    ]
    placed = table(["table", "rows", "columns", "size", "sharding type", "kernel", "ranks"], rows)
    details = f"<details><summary>Tables ({len(rows)})</summary>{placed}</details>"
    if not plan.ranks:
        return f"<p>The file holds no estimates of ranks.</p>{details}"
    fullest, room = max(rank.memory_bytes for rank in plan.ranks), plan.available_bytes
    text = (
        f"<p>{len(plan.ranks):,} rank{'s' * (len(plan.ranks) > 1)}. The fullest holds {size_text(fullest)} of the "
        f"{size_text(room)} that tables may use; tables take {plan.step_ms:.3g} ms of a step, "
        f"{plan.fixed_ms:.3g} ms of them fixed costs, the same on every rank (the planner's estimates).</p>"
    )
    bars = _bars("memory a rank", _MEMORY, plan.ranks, _bytes) + _bars("time a rank", _TIME, plan.ranks, _milliseconds)
    if any(rank.host_bytes for rank in plan.ranks):
        bars += _bars("host memory a rank", _HOST, plan.ranks, _bytes)
    return f'{text}<div class="plots">{bars}</div>{details}'


def _bars(title: str, parts: Sequence[Part], ranks: Sequence[RankEstimate], say: Callable[[float], str]) -> str:
    shown = range(0, len(ranks), -(-len(ranks) // MAX_BARS))
    most = max(sum(size(rank) for _, size in parts) for rank in ranks) or 1.0
    pitch = min(_MAX_BAR_WIDTH, _WIDTH / len(shown))
    drawn = []
    for place, rank in enumerate(shown):
        floor = float(_HEIGHT - _BOTTOM)
        said = ", ".join(f"{name} {say(size(ranks[rank]))}" for name, size in parts)
        rectangles = []
        for colour, (_, size) in enumerate(parts):
            height = size(ranks[rank]) / most * (_HEIGHT - _TOP - _BOTTOM)
            floor -= height
            rectangles.append(
                f'<rect class="bar c{colour}" x="{place * pitch:.2f}" y="{floor:.2f}" width="{pitch * 0.85:.2f}" '
                f'height="{height:.2f}"/>'
            )
        drawn.append(f"<g><title>rank {rank}: {escape(said)}</title>{''.join(rectangles)}</g>")
    keys = "".join(
        f'<span class="key"><svg width="12" height="12" aria-hidden="true"><rect class="bar c{colour}" width="12" '
        f'height="12"/></svg>{escape(name)}</span>'
        for colour, (name, _) in enumerate(parts)
    )
    last = ""
    if len(shown) > 1:
        x = max(len(shown) * pitch, 60)
        last = f'<text class="tick" x="{x:.0f}" y="{_HEIGHT - 8}" text-anchor="end">{shown[-1]}</text>'
    return (
        f'<figure><figcaption>{escape(title)} <span class="quiet">highest {say(most)}</span></figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(drawn)}'
        f'<path class="axis" d="M0 {_HEIGHT - _BOTTOM}H{_WIDTH}"/>'
        f'<text class="tick" x="0" y="{_HEIGHT - 8}">rank 0</text>'
        f'{last}</svg><p class="legend">{keys}</p></figure>'
    )


def _bytes(size: float) -> str:
    return size_text(int(size))


def _milliseconds(size: float) -> str:
    return f"{size:.3g} ms"
