"""The demo: what its run's last evaluation says, beside the rates of items and users.

    make train
    python -m benchmarks.demo runs/kuairand_sample [--json FILE]

Prints the table of docs/quality.md.
"""

import argparse
import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.days import METRICS, cells
from benchmarks.measured_on import device
from trainer.run.json_lines import read_records
from trainer.run.run_dir import RunDir

RESULTS = Path(__file__).parent / "results" / "demo.json"


def main() -> None:
    parser = argparse.ArgumentParser(description="Show what the demo's last evaluation says.")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--json", type=Path, default=None, help="write the figures to this file")
    arguments = parser.parse_args()
    result = {"hardware": device(), "date": datetime.date.today().isoformat(), "labels": labels(arguments.run_dir)}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


def labels(run_dir: Path) -> dict[str, dict[str, float]]:
    """What the newest evaluation found of each label."""
    record = read_records(RunDir(run_dir).eval_file)[-1]
    names = [name.removeprefix("ne/") for name in record if name.startswith("ne/")]
    return {name: {metric: record[f"{metric}/{name}"] for metric in METRICS} for name in names}


def table(result: Mapping[str, Any]) -> str:
    """The figures as docs/quality.md shows them."""
    lines = ["| label | positives | NE | of the rates | AUC, 95% interval | of the rates | difference |"]
    lines.append("| --- " * 7 + "|")
    lines += [f"| {name} | {cells(found)} |" for name, found in result["labels"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
