"""Days one after another: what a run of `kuairand_days` predicted of each day before it was trained on.

    python -m pipelines.prepare kuairand --source KUAIRAND_PURE --out data/kuairand_days --histories gathered \
        --max-history 120
    python -m trainer train kuairand_days
    python -m benchmarks.days runs/kuairand_days [--json FILE]

Prints the table of docs/quality.md, from the run's progressive.jsonl and its evaluation of the last day.
"""

import argparse
import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.measured_on import device
from trainer.run.json_lines import read_records

RESULTS = Path(__file__).parent / "results" / "days.json"
LABEL = "long_view"
METRICS = ("positives", "ne", "ne_baseline", "auc", "auc_95", "auc_baseline")


def main() -> None:
    parser = argparse.ArgumentParser(description="Show what was predicted of each day before it was trained on.")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--json", type=Path, default=None, help="write the figures to this file")
    arguments = parser.parse_args()
    result = {
        "hardware": device(),
        "date": datetime.date.today().isoformat(),
        "label": LABEL,
        "days": days(arguments.run_dir),
    }
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


def days(run_dir: Path) -> list[dict[str, Any]]:
    """What was found of each day that was scored before it was trained on, and of the last one, which never is."""
    records = read_records(run_dir / "progressive.jsonl")
    for last in read_records(run_dir / "eval.jsonl")[-1:]:
        records.append({"part": "the last day", **last})
    return [
        {"day": record["part"], "step": record["step"], **{name: record.get(f"{name}/{LABEL}") for name in METRICS}}
        for record in records
    ]


def table(result: Mapping[str, Any]) -> str:
    """The figures as docs/quality.md shows them."""
    lines = ["| day | steps before | positives | NE | of the rates | AUC, 95% interval | of the rates | difference |"]
    lines.append("| --- " * 8 + "|")
    lines += [f"| {day['day']} | {day['step']} | {cells(day)} |" for day in result["days"]]
    return "\n".join(lines)


def cells(found: Mapping[str, float | None]) -> str:
    """What `METRICS` say of a label, the model's beside the rates'; - for what is undefined or was not measured."""
    gain = None
    if found["auc"] is not None and found["auc_baseline"] is not None:
        gain = found["auc"] - found["auc_baseline"]
    shown = [_cell(found[name], ".3f") for name in ("ne", "ne_baseline", "auc", "auc_95", "auc_baseline")]
    ne, ne_baseline, auc, auc_95, auc_baseline = shown
    positives = _cell(found["positives"], ",.0f")
    return f"{positives} | {ne} | {ne_baseline} | {auc} +- {auc_95} | {auc_baseline} | {_cell(gain, '+.3f')}"


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


if __name__ == "__main__":
    main()
