"""What each kind of column is worth: a recipe trained on more and more of its data's columns.

Run: python -m benchmarks.ablation [--work DIR] [--only ROW ...] [--jobs 2]
     python -m benchmarks.ablation --table

The recipe `kuairand_sample` is trained as it comes, with no setting but the columns and seeds.  A run that is done
under DIR is used again.  The table's cells are means over the seeds, with the largest distance of a seed from the mean.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.measured_on import device
from benchmarks.quality.trainings import Training, seeded, train_all

RECIPE, SEEDS = "kuairand_sample", (0, 1, 2)
RESULTS = Path("benchmarks/results/ablation.json")
SHOWN = ("is_click", "long_view", "is_like", "is_profile_enter")
"""Actions with enough positives in the evaluation split to tell rows apart."""

ITEM = ("item_id",)
ATTRIBUTES = tuple(f"item.{name}" for name in ("author", "music", "video_type", "upload_type", "music_type", "tags"))
NUMBERS = ("item.duration_s",)
GROUPS = ("item", "user", "user_item")

Inputs = Mapping[str, Sequence[str] | None]
ROWS: Mapping[str, Inputs] = {
    "item id": {"event": ITEM, "candidate": ITEM, "counts": (), "context": ()},
    "+ item attributes": {
        "event": ITEM + ATTRIBUTES,
        "candidate": ITEM + ATTRIBUTES,
        "counts": (),
        "context": (),
    },
    "+ candidate features and numbers": {
        "event": (*ITEM, *ATTRIBUTES, *NUMBERS, "watch_time_ms"),
        "candidate": ITEM + ATTRIBUTES + NUMBERS,
        "counts": GROUPS,
        "context": (),
    },
    "+ user features": {"event": None, "candidate": None, "counts": None, "context": None},
    "the same without item attributes": {
        "event": (*ITEM, *NUMBERS, "watch_time_ms"),
        "candidate": ITEM + NUMBERS,
        "counts": GROUPS,
        "context": None,
    },
}
"""What the model reads, as `model.input` says it; the fourth row is all that the data has."""


def main() -> None:
    parser = argparse.ArgumentParser(description="What each kind of column is worth.")
    parser.add_argument("--work", type=Path, default=Path("runs/ablation"), help="folder for the runs")
    parser.add_argument("--only", nargs="+", choices=list(ROWS), help="rows; all if not given")
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the result goes; other rows in it stay")
    parser.add_argument("--table", action="store_true", help="print the table of the result, and do nothing else")
    arguments = parser.parse_args()
    if not arguments.table:
        rows = arguments.only or list(ROWS)
        runs = [training(row, seed, arguments.work) for row in rows for seed in SEEDS]
        lines = (run.evaluations[-1] for run in train_all(runs, arguments.jobs))
        found = {row: [next(lines) for _ in SEEDS] for row in rows}
        arguments.json.write_text(json.dumps(merged(arguments.json, found), indent=1) + "\n")
    print(table(json.loads(arguments.json.read_text())))


def training(row: str, seed: int, work: Path) -> Training:
    """A row's run of a seed."""
    inputs = [f"model.input.{name}={json.dumps(columns)}" for name, columns in ROWS[row].items()]
    run = work / f"{list(ROWS).index(row)}-{seed}"
    return Training(recipe=RECIPE, run=run, settings=(*seeded(seed), *inputs))


def merged(file: Path, found: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """The result with these rows, in the order of `ROWS`; what the file says of others stays."""
    known = json.loads(file.read_text())["rows"] if file.is_file() else {}
    known |= {
        row: {
            "inputs": ROWS[row],
            "metrics": {
                name: [metrics[name] for metrics in seeds] for name in seeds[0] if name.startswith(("auc/", "ne/"))
            },
        }
        for row, seeds in found.items()
    }
    return {
        "recipe": RECIPE,
        "seeds": list(SEEDS),
        "hardware": device(),
        "rows": {row: known[row] for row in ROWS if row in known},
    }


def table(report: Mapping[str, Any]) -> str:
    """The result as a table in Markdown: AUC and NE of each shown action."""
    lines = [
        "| the model reads | " + " | ".join(f"{action}: AUC | NE" for action in SHOWN) + " |",
        "| --- |" + " --- |" * 2 * len(SHOWN),
    ]
    for row, values in report["rows"].items():
        cells = [_cell(values["metrics"][f"{metric}/{action}"]) for action in SHOWN for metric in ("auc", "ne")]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: Sequence[float]) -> str:
    centre = mean(values)
    return f"{centre:.3f} +- {max(abs(value - centre) for value in values):.3f}"


if __name__ == "__main__":
    main()
