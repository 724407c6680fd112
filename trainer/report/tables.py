"""What runs are and what they reached, as HTML tables with the runs side by side."""

import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

from trainer.report.curves import BASELINE, curved_metrics, metric_title
from trainer.report.run_files import Record, RunFiles

ABSENT = "-"
"""What is shown in the place of a value that is not there."""

_COUNT = "positives"
_INTERVAL = "_95"
"""Ends the name of a metric that is half the 95% interval of another one."""

_LIFETIME = "lifetime_"
"""Begins the name of a metric of all candidates since the job's last start."""

_TIMES = {"first logged step": 0, "last logged step": -1}
"""Facts that differ between any two runs, so that it is not worth a mark; by the place among the records."""


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], marked: Sequence[bool] = (), kind: str = "") -> str:
    """Plain text in cells, the first column as names; rows that are `marked` stand out."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    body = []
    for place, (name, *cells) in enumerate(rows):
        mark = ' class="differs"' if place < len(marked) and marked[place] else ""
        values = "".join(f"<td>{escape(text)}</td>" for text in cells)
        body.append(f'<tr{mark}><th scope="row">{escape(name)}</th>{values}</tr>')
    return (
        f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def evaluation_table(records: Sequence[Sequence[Record]], runs: Sequence[RunFiles]) -> str:
    """The newest evaluation of each run, a row a label and run that has it, a column a metric."""
    newest = [(run.name, of_run[-1]) for run, of_run in zip(runs, records, strict=True) if of_run]
    names = list(dict.fromkeys(name for _, record in newest for name in record if name != "step"))
    pairs = [name.partition("/")[::2] for name in names]
    metrics = sorted(dict.fromkeys(metric for metric, _ in pairs), key=lambda metric: metric != _COUNT)
    metrics = [
        metric for metric in metrics if not (metric.endswith(_INTERVAL) and metric.removesuffix(_INTERVAL) in metrics)
    ]
    # A baseline's number is shown beside the model's, not as a metric of its own.
    own = [metric for metric in metrics if not metric.endswith(BASELINE)]
    metrics = [each for metric in own for each in (metric, metric + BASELINE) if each in metrics]
    rows = []
    for label in dict.fromkeys(label for _, label in pairs):
        for run, record in newest:
            of_label = {metric: record.get(f"{metric}/{label}" if label else metric) for metric in metrics}
            half = {metric: record.get(f"{metric}{_INTERVAL}/{label}") for metric in metrics}
            cells = [_measured(of_label[metric], half[metric], is_count=metric == _COUNT) for metric in metrics]
            if any(cell != ABSENT for cell in cells):
                rows.append([label or "all", run, f"{record['step']:,}", *cells])
    return table(["label", "run", "step", *map(metric_title, metrics)], rows, kind="named")


def lifetime_table(runs: Sequence[RunFiles]) -> str:
    """What each run's newest logged step says of all candidates since its last start, a row a label and run."""
    records = [
        [
            {"step": run.last.get("step", 0)}
            | {name.removeprefix(_LIFETIME): run.last[name] for name in run.last if name.startswith(_LIFETIME)}
        ]
        for run in runs
    ]
    return evaluation_table(records, runs)


def progressive_table(runs: Sequence[RunFiles]) -> str:
    """A row a part and run, in the order in which the parts were met; a baseline's number behind the model's."""
    found = {name for run in runs for record in run.progressive for name in record}
    own = curved_metrics(record for run in runs for record in run.progressive)
    pairs = (
        (name, f"{metric}{BASELINE}{slash}{label}") for name in own for metric, slash, label in [name.partition("/")]
    )
    names = [name for pair in pairs for name in pair if name in found]
    parts = dict.fromkeys(str(record.get("part")) for run in runs for record in run.progressive)
    rows = [
        [part, run.name, f"{record['step']:,}", *(_measured(record.get(name)) for name in names)]
        for part in parts
        for run in runs
        for record in run.progressive
        if str(record.get("part")) == part
    ]
    return table(["part", "run", "step", *map(metric_title, names)], rows, kind="named")


def configuration_tables(runs: Sequence[RunFiles]) -> str:
    """What differs between the runs, then every key, where differences stand out."""
    settings = [leaves(run.config) for run in runs]
    keys = list(dict.fromkeys(key for of_run in settings for key in of_run))
    rows = [[key, *(of_run.get(key, ABSENT) for of_run in settings)] for key in keys]
    different = [len(set(row[1:])) > 1 for row in rows]
    heads = ["key", *(run.name for run in runs)]
    parts = []
    if len(runs) > 1:
        found = [row for row, differs in zip(rows, different, strict=True) if differs]
        said = table(heads, found, [True] * len(found), "words") if found else "<p>The runs have the same settings.</p>"
        parts.append(said)
    parts.append(
        f"<details><summary>All {len(rows)} settings</summary>{table(heads, rows, different, 'words')}</details>"
    )
    return "".join(parts)


def leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted keys and values as JSON of a nested dictionary, as `--set` takes them.

    >>> leaves({"model": {"dim": 64, "channels": []}})
    {'model.dim': '64', 'model.channels': '[]'}
    """
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            found |= leaves(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value if isinstance(value, str) else json.dumps(value)
    return found


def environment_table(runs: Sequence[RunFiles]) -> str:
    """On what the runs were made, as far as their files say; what differs stands out."""
    facts = [_environment(run) for run in runs]
    rows = [[name, *(of_run[name] for of_run in facts)] for name in facts[0]]
    different = [len(set(row[1:])) > 1 and row[0] not in _TIMES for row in rows]
    return table(["", *(run.name for run in runs)], rows, different, "words")


def summary_table(runs: Sequence[RunFiles]) -> str:
    """A row a run: how far it is and what it logged last."""
    rows = [
        [
            run.name,
            str(run.config.get("name", ABSENT)),
            f"{run.last.get('step', 0):,}",
            _measured(run.last.get("samples")),
            _measured(run.last.get("loss")),
            _measured(run.last.get("samples_per_s")),
            "; ".join(run.notes) or ABSENT,
        ]
        for run in runs
    ]
    return table(
        ["run", "recipe", "step", "samples", "last loss", "last samples/s", "notes"], rows, kind="named summary"
    )


def _environment(run: RunFiles) -> dict[str, str]:
    versions = run.environment.get("versions", {})
    worlds = dict.fromkeys(str(record["world_size"]) for record in run.metrics if "world_size" in record)
    machine = run.plan.machine if run.plan else None
    memory = machine and (machine.hbm_gib if machine.compute_device == "cuda" else machine.ddr_gib)
    times = [record["time"] for record in run.metrics if "time" in record]
    peaks = [record["peak_gib"] for record in run.metrics if "peak_gib" in record]
    return {
        "devices": run.environment.get("devices", ABSENT),
        "versions": ", ".join(map(" ".join, versions.items())) or ABSENT,
        "processes": ", then ".join(worlds) or ABSENT,
        "processes a machine": str(machine.local_world_size) if machine else ABSENT,
        "device": machine.compute_device if machine else ABSENT,
        "memory a process": f"{memory:g} GiB" if memory else ABSENT,
        "peak memory of a GPU": f"{max(peaks):.2f} GiB" if peaks else ABSENT,
        **{name: _when(times[end]) if times else ABSENT for name, end in _TIMES.items()},
    }


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _measured(value: object, half: object = None, *, is_count: bool = False) -> str:
    """A number with its interval; counts without decimals, rates of hundreds with one."""
    if not isinstance(value, int | float):
        return ABSENT
    if not math.isfinite(value):
        return str(value)
    decimals = 0 if value == int(value) and (is_count or abs(value) >= 2) else 1 if abs(value) >= 100 else 4
    text = f"{value:,.{decimals}f}"
    return f"{text} \u00b1 {half:.4f}" if isinstance(half, int | float) else text
