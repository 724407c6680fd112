"""A plan as bars a rank: memory by what it holds, and the estimated time of a step."""

from collections.abc import Callable, Sequence
from html import escape

from embeddings.plan import Plan, RankEstimate, size_text

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

STYLE = """
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,22rem),1fr));gap:1.2rem 1.6rem}
figure{margin:0}figcaption{font-weight:600;margin-bottom:.2rem}figure>svg{display:block;width:100%;height:auto}
.legend{margin:0;padding:.5rem 0;display:flex;flex-wrap:wrap;gap:.3rem 1.4rem}
.key{display:inline-flex;align-items:center;gap:.4rem;overflow-wrap:anywhere}.key svg{flex:none}
figure .legend{font-size:.85rem;padding:0}
.grid{stroke:var(--line);fill:none}.axis{stroke:var(--quiet);fill:none}
.tick{font-size:11px;fill:var(--quiet)}.quiet,figcaption span{color:var(--quiet);font-weight:normal}
.bar{fill:var(--c)}"""
"""Style of the bars.  The page around them states --line, --quiet and colours, as `--c` of the classes c0, c1, c2."""


def rank_bars(plan: Plan) -> str:
    """The bars of a plan with estimates, as HTML."""
    bars = _bars("memory a rank", _MEMORY, plan.ranks, _bytes) + _bars("time a rank", _TIME, plan.ranks, _milliseconds)
    if any(rank.host_bytes for rank in plan.ranks):
        bars += _bars("host memory a rank", _HOST, plan.ranks, _bytes)
    return f'<div class="plots">{bars}</div>'


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
