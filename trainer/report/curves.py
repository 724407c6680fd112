"""Numbers over steps as SVG: one plot a number, one curve a run."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from trainer.report.run_files import Record, RunFiles

MAX_RUNS = 32
"""Runs that colour and dash tell apart on one page: 8 colours in `page.py`, 4 dashes."""
BASELINE = "_baseline"
"""Ends the name of a metric of what knows no sequences."""
MAX_POINTS = 200
"""The most points of a curve: a longer one is drawn as the means of so many stretches, on a band from the lowest to the
highest value of each."""

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 460, 230, 58, 18, 10, 28
_DASHES = ("", "6 3", "2 3", "8 3 2 3")
_MARKED_POINTS = 40
"""Curves of at most so many points show each, with its value."""
_LOG_FACTOR = 5
"""A positive number that varies by more, and goes beyond 1, is drawn on a logarithmic axis: not what is a share."""

_NOT_DRAWN = ("step", "samples", "time", "world_size")
_TITLES = {
    "loss": "loss",
    "gradient_norm": "norm of the dense gradients",
    "samples_per_s": "samples/s",
    "tokens_per_s": "tokens/s",
    "step_ms": "step, ms",
    "mfu": "MFU",
    "imbalance": "imbalance of the ranks",
    "data_wait": "time waited for data, of all",
    "peak_gib": "peak memory of a GPU, GiB",
    "learning_rate_factor": "learning rate, of its full value",
}
"""The first plots, in this order; other numbers of the metrics follow under their own names."""

_ACRONYMS = {"ne", "auc", "gauc", "mae", "rmse", "hr", "ndcg", "mrr"}

Points = list[tuple[float, float]]
"""(step, value) in the order of steps."""


@dataclass(frozen=True, slots=True)
class Axis:
    """Where values lie between two ends, and which of them are labelled."""

    low: float
    high: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """0 at the lower end, 1 at the upper."""
        low, high, value = (math.log(x) if self.logarithmic else x for x in (self.low, self.high, value))
        return (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Three to six round values between the ends."""
        if self.logarithmic:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1, 2, 5), (1, 3), (1,)):
                found = [step * 10.0**power for power in powers for step in steps]
                found = [value for value in found if self.low <= value <= self.high]
                if len(found) <= 6:
                    break
            return found[:: -(-len(found) // 6)]
        rough = (self.high - self.low) / 5
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * (1 - 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [count * step for count in range(first, last + 1)]


def training_curves(runs: Sequence[RunFiles]) -> str:
    """A plot of each number of the logged steps."""
    found = {name for run in runs for record in run.metrics for name in record if _is_number(record[name])}
    names = [name for name in _TITLES if name in found]
    names += sorted(name for name in found - set(names) - set(_NOT_DRAWN) if "/" not in name)
    return "".join(plot(_TITLES.get(name, name), [points(run.metrics, name) for run in runs], runs) for name in names)


def label_curves(runs: Sequence[RunFiles]) -> str:
    """A plot of NE and AUC of each label over the candidates that were trained on, each a step before it was."""
    found = dict.fromkeys(name for run in runs for name in run.last if name.startswith(("ne/", "auc/")))
    return "".join(plot(metric_title(name), [points(run.metrics, name) for run in runs], runs) for name in found)


def evaluation_curves(records: Sequence[Sequence[Record]], runs: Sequence[RunFiles]) -> str:
    """A plot of each label's NE and AUC, or of all that is measured where there are none; `records` by run.

    Nothing where no run has two evaluations.
    """
    if all(len(of_run) < 2 for of_run in records):
        return ""
    plots = []
    for name in curved_metrics(record for of_run in records for record in of_run):
        curves = [points(of_run, name) for of_run in records]
        if any(len(curve) > 1 for curve in curves):
            plots.append(plot(metric_title(name), curves, runs))
    return "".join(plots)


def metric_title(name: str) -> str:
    """What people call it.

    >>> metric_title("ne/click"), metric_title("hr@10"), metric_title("log_loss/kind"), metric_title("ne_unknown")
    ('NE of click', 'HR@10', 'log loss of kind', 'NE of unknown items')
    """
    metric, slash, label = name.partition("/")
    for suffix, meaning in ((BASELINE, "of the baseline"), ("_unknown", "of unknown items")):
        if metric.endswith(suffix):
            return f"{metric_title(metric.removesuffix(suffix) + slash + label)} {meaning}"
    title = metric.upper() if metric.partition("@")[0] in _ACRONYMS else metric.replace("_", " ")
    return f"{title} of {label}" if label else title


def curved_metrics(records: Iterable[Record]) -> list[str]:
    """The metrics that are drawn: NE and AUC of each label, in the order of the records; every metric without a
    label."""
    found = dict.fromkeys(name for record in records for name in record if name not in ("step", "part"))
    # A baseline does not change from step to step: tables have it.
    names = [name for name in found if not name.partition("/")[0].endswith(BASELINE)]
    chosen = [name for name in names if name.startswith(("ne/", "auc/"))]
    labels = {name.partition("/")[2] for name in chosen}
    return [name for name in names if name in chosen or name.partition("/")[2] not in labels]


def points(records: Sequence[Record], name: str) -> Points:
    """The steps where the number is known, with its value."""
    return [(record["step"], record[name]) for record in records if _is_number(record.get(name))]


def legend(runs: Sequence[RunFiles]) -> str:
    """Which colour is which run."""
    keys = (
        f'<span class="key"><svg width="30" height="10" aria-hidden="true">'
        f'<path class="curve c{run % 8}" {_dash(run)} d="M0 5H30"/></svg>{escape(files.name)}</span>'
        for run, files in enumerate(runs)
    )
    return f'<p class="legend">{"".join(keys)}</p>'


def plot(title: str, curves: Sequence[Points], runs: Sequence[RunFiles]) -> str:
    """One plot; `curves` by run, of which some may be empty."""
    values = [value for curve in curves for _, value in curve]
    steps = [step for curve in curves for step, _ in curve]
    if not values:
        return ""
    across, up = _step_axis(steps), _value_axis(values)
    drawn = "".join(_curve(index, curve, runs[index].name, across, up) for index, curve in enumerate(curves) if curve)
    scale = ' <span class="quiet">logarithmic</span>' if up.logarithmic else ""
    return (
        f'<figure><figcaption>{escape(title)}{scale}</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(title)} over steps">{_grid(across, up)}{drawn}</svg></figure>'
    )


def _step_axis(steps: list[float]) -> Axis:
    low, high = min(steps), max(steps)
    return Axis(low, high) if high > low else Axis(low - 1, high + 1)


def _value_axis(values: list[float]) -> Axis:
    low, high = min(values), max(values)
    if low > 0 and high > max(1.0, _LOG_FACTOR * low):
        return Axis(low / 1.1, high * 1.1, logarithmic=True)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return Axis(low - margin, high + margin)


def _grid(across: Axis, up: Axis) -> str:
    parts = []
    for value in up.ticks():
        y = _y(up, value)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_tick(value)}</text>')
    for value in across.ticks():
        if value == int(value) and value >= 0:
            x = _x(across, value)
            parts.append(f'<path class="grid" d="M{x:.1f} {_HEIGHT - _BOTTOM}v4"/>')
            parts.append(f'<text class="tick" x="{x:.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{_tick(value)}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}"/>')
    return "".join(parts)


def _curve(index: int, curve: Points, name: str, across: Axis, up: Axis) -> str:
    stretches = _stretches(curve)
    band = [(step, max(values)) for step, values in stretches] + [
        (step, min(values)) for step, values in stretches[::-1]
    ]
    means = [(step, sum(values) / len(values)) for step, values in stretches]
    drawn = f'<path class="curve c{index % 8}" {_dash(index)} d="{_path(means, across, up)}">'
    drawn += f"<title>{escape(name)}</title></path>"
    if len(stretches) < len(curve):
        drawn = f'<path class="band c{index % 8}" d="{_path(band, across, up)}Z"/>{drawn}'
    if len(curve) <= _MARKED_POINTS:
        drawn += "".join(
            f'<circle class="dot c{index % 8}" cx="{_x(across, step):.1f}" cy="{_y(up, value):.1f}" r="3">'
            f"<title>{escape(name)}, step {step:,}: {value:.6g}</title></circle>"
            for step, value in curve
        )
    return drawn


def _stretches(curve: Points) -> list[tuple[float, list[float]]]:
    """(mean step, values) of neighbouring points; each point alone in a short curve."""
    size = -(-len(curve) // MAX_POINTS)
    parts = [curve[first : first + size] for first in range(0, len(curve), size)]
    return [(sum(step for step, _ in part) / len(part), [value for _, value in part]) for part in parts]


def _path(places: Points, across: Axis, up: Axis) -> str:
    return "M" + "L".join(f"{_x(across, step):.1f} {_y(up, value):.1f}" for step, value in places)


def _dash(run: int) -> str:
    dash = _DASHES[run // 8]
    return f'stroke-dasharray="{dash}"' if dash else ""


def _x(axis: Axis, step: float) -> float:
    return _LEFT + axis.place(step) * (_WIDTH - _LEFT - _RIGHT)


def _y(axis: Axis, value: float) -> float:
    return _HEIGHT - _BOTTOM - axis.place(value) * (_HEIGHT - _BOTTOM - _TOP)


def _tick(value: float) -> str:
    """A round value in few characters: 0.25, 1,500, 20k, 3M, 1e+20."""
    if abs(value) >= 1e15:
        return f"{value:g}"
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or (abs(value) >= size and size > 1e3):
            return f"{value / size:g}{suffix}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{round(value, 12):.6g}"


def _is_number(value: object) -> bool:
    """Whether it has a place on an axis."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
