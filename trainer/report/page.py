"""The page: one HTML file with its style and pictures in it, which loads nothing and runs nothing."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from embeddings.planning import rank_bars
from trainer.command_line import WrongUse
from trainer.report.curves import MAX_POINTS, MAX_RUNS, evaluation_curves, label_curves, legend, training_curves
from trainer.report.plan_section import plan_section
from trainer.report.run_files import RunFiles, read_runs
from trainer.report.tables import (
    configuration_tables,
    environment_table,
    evaluation_table,
    lifetime_table,
    progressive_table,
    summary_table,
)
from trainer.run.writing import replace_text

_LIGHT = ("#2f6db3", "#c8561b", "#2c8a57", "#8d4bb0", "#b8860b", "#c23b62", "#17818c", "#6b6b6b")
_DARK = ("#74b0f0", "#f39a5f", "#68cf96", "#c592e6", "#e3bd4f", "#f286a3", "#5cc6d1", "#b0b0b0")
"""Colours of the runs, one after another: on a light ground, and on a dark one."""

_STYLE = """
:root{color-scheme:light dark;--ground:#fff;--text:#1d232b;--quiet:#5d6875;--line:#dfe3e8;--mark:#fff1c9;%(light)s}
@media (prefers-color-scheme:dark){
:root{--ground:#15191f;--text:#e4e8ed;--quiet:#98a3b0;--line:#333b46;--mark:#4a3d15;%(dark)s}}
body{font:15px/1.45 system-ui,sans-serif;max-width:78rem;margin:0 auto;padding:1rem 1.5rem 4rem;
background:var(--ground);color:var(--text)}
h1{font-size:1.5rem}h2{font-size:1.2rem;margin:2.2rem 0 .6rem}h3{font-size:1rem;margin:1.2rem 0 .3rem}
.runs{position:sticky;top:0;background:var(--ground);border-bottom:1px solid var(--line);margin-bottom:1rem;z-index:1}
.curve{fill:none;stroke:var(--c);stroke-width:1.8;stroke-linejoin:round}.dot{fill:var(--c)}.band{fill:var(--c);opacity:.16}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem}
th,td{padding:.28rem .65rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
thead th{color:var(--quiet);font-weight:600;vertical-align:bottom;white-space:normal}
.named td:nth-child(2),.named th:nth-child(2),th:first-child{text-align:left}th:first-child{padding-left:.4rem}
tbody th{font-weight:normal}
.words td,.words th,.summary td:last-child,.summary th:last-child{text-align:left;white-space:normal;
overflow-wrap:anywhere}.words tbody th{font-family:ui-monospace,monospace;white-space:nowrap}
.summary td:last-child{min-width:18rem}tr.differs>*{background:var(--mark)}summary{cursor:pointer;padding:.4rem 0}
%(classes)s"""


def write_report(run_dirs: Sequence[Path], out: Path) -> None:
    """Write the page of these runs to `out`.

    Raises:
        WrongUse: a directory is no run's or has nothing to show yet, there are too many, or `out` cannot be a file.
        ValueError: a file of a run is damaged.
        OSError: `out` cannot be written; what was there is there still.
    """
    if len(run_dirs) > MAX_RUNS:
        raise WrongUse(f"{len(run_dirs)} runs, but a page tells at most {MAX_RUNS} apart: name fewer")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise WrongUse(f"--out {out} cannot be written: name a file in a folder that exists")
    replace_text(out, report_page(read_runs(list(run_dirs))))


def report_page(runs: Sequence[RunFiles]) -> str:
    """The whole page."""
    title = f"{len(runs)} runs" if len(runs) > 1 else f"Run {runs[0].name}"
    sections = [
        summary_table(runs),
        _plots("Training", training_curves(runs)),
        *_labels(runs),
        *_evaluations(runs),
        *_progressive(runs),
        *_plans(runs),
        _section("Configuration", configuration_tables(runs)),
        _section("Environment", environment_table(runs)),
    ]
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width"><title>{escape(title)}</title><style>{_style()}</style></head>\n<body>\n'
        f'<h1>{escape(title)}</h1>\n<div class="runs">{legend(runs)}</div>\n'
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def _labels(runs: Sequence[RunFiles]) -> list[str]:
    """What was measured of the candidates that were trained on, if anything was."""
    plots = label_curves(runs)
    if not plots:
        return []
    heading = "Candidates as they were trained on"
    return [_plots(heading, plots), _section(f"{heading}, since the last start", lifetime_table(runs))]


def _evaluations(runs: Sequence[RunFiles]) -> list[str]:
    """For each data set that was scored the newest result and, if there are several evaluations, their curves."""
    sections = []
    for data in dict.fromkeys(data for run in runs for data in run.evaluations):
        records = [run.evaluations.get(data, []) for run in runs]
        of_data = f" on {data}" if data else ""
        sections.append(_section(f"Last evaluation{of_data}", evaluation_table(records, runs)))
        sections.append(_plots(f"Evaluations{of_data}", evaluation_curves(records, runs)))
    return sections


def _progressive(runs: Sequence[RunFiles]) -> list[str]:
    """The parts that were scored before they were trained on, if there are any."""
    records = [run.progressive for run in runs]
    if not any(records):
        return []
    heading = "Parts, each scored before it was trained on"
    return [_section(heading, progressive_table(runs)), _plots("Parts", evaluation_curves(records, runs))]


def _plans(runs: Sequence[RunFiles]) -> list[str]:
    found = [f"<h3>{escape(run.name)}</h3>{plan_section(run.plan)}" for run in runs if run.plan is not None]
    return [_section("Placement of the tables", "".join(found))] if found else []


def _plots(heading: str, plots: str) -> str:
    """Nothing where there is nothing to plot."""
    note = f"Of more than {MAX_POINTS} points: means of neighbours, on a band from the lowest to the highest."
    said = f'<p class="quiet">{note}</p>' if 'class="band' in plots else ""
    return _section(f"{heading} over steps", f'{said}<div class="plots">{plots}</div>') if plots else ""


def _section(heading: str, content: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>{content}</section>"


def _style() -> str:
    light, dark = ("".join(f"--c{i}:{colour};" for i, colour in enumerate(colours)) for colours in (_LIGHT, _DARK))
    classes = "".join(f".c{i}{{--c:var(--c{i})}}" for i in range(len(_LIGHT)))
    return _STYLE % {"light": light, "dark": dark, "classes": classes} + rank_bars.STYLE
