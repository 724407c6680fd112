"""Tables of quality: recipes on public data, each in a stated protocol, several seeds, from files to figures.

Run: python -m benchmarks.quality --table ml1m --source DIR --work DIR [--rows NAME ...] [--seeds 5] [--jobs 2]
     python -m benchmarks.quality --show

Of every row and order of ties the pass is chosen on each user's last event but one: the recipe is trained on the data
without the last events (`prepare --drop-last 1`), evaluated every few passes, and the pass with the best NDCG@10
counts.  Then it is trained on all but the last events, once a seed, and read at that pass: the last events are seen
once.  With `--last-pass` nothing is chosen, and the recipe's last pass counts.

The result of a table goes to benchmarks/results/quality_NAME.json, where rows that were not run stay; docs/quality.md
shows it.  What is done under --work is used again.
"""

import argparse
import datetime
import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.trainings import Trained, Training, hardware, prepare, seeded, train_all
from pipelines.dataset_json import read_dataset_info
from trainer.recipes import load_recipe

RESULTS = Path("benchmarks/results")
METRICS = ("hr@10", "ndcg@10", "hr@50", "mrr")
CHOSEN_BY = "ndcg@10"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One recipe of a table."""

    recipe: str
    prepare: tuple[str, ...]
    """Arguments of its preparation, but for files, order of ties and what is left out."""
    settings: tuple[str, ...] = ()
    """Over the recipe's."""
    every_passes: int = 5
    """Passes between two evaluations on the validation item."""
    published: tuple[float, float] | None = None
    """HR@10 and NDCG@10 that its authors print, in the first order of ties."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Recipes in one protocol."""

    dataset: str
    """What `pipelines.prepare` calls the publisher."""
    orders: tuple[str, ...]
    """Of events of one second, `--ties`."""
    rows: tuple[Row, ...]


_WHOLE = ("--leave-last", "1", "--candidates", "1")
_PIECES = ("--leave-last", "1", "--samples-per-user", "0", "--candidates", "199")
_LONG = (*_PIECES, "--train-history", "1", "--max-history", "199")

TABLES: Mapping[str, Table] = {
    "ml1m": Table(
        dataset="movielens",
        orders=("gr", "log"),
        rows=(
            Row(recipe="ml1m_sasrec", prepare=_WHOLE, published=(0.2853, 0.1603)),
            Row(recipe="ml1m_hstu", prepare=_WHOLE, published=(0.3097, 0.1720)),
            Row(recipe="ml1m_hstu_large", prepare=_WHOLE, published=(0.3294, 0.1893)),
            Row(recipe="ml1m_longview", prepare=_LONG),
        ),
    ),
}
"""Every table by name."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Recipes on public data, in a stated protocol.")
    parser.add_argument("--table", choices=list(TABLES), default="ml1m", help="which table")
    parser.add_argument("--source", type=Path, help="folder with the publisher's files")
    parser.add_argument("--work", type=Path, help="folder for prepared data and runs")
    parser.add_argument("--rows", nargs="+", help="recipes; all if not given")
    parser.add_argument("--orders", nargs="+", help="orders of ties; all if not given")
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each row that are tested")
    parser.add_argument("--last-pass", action="store_true", help="choose no pass: the recipe's last one counts")
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side")
    parser.add_argument("--show", action="store_true", help="print the table of the result, and do nothing else")
    arguments = parser.parse_args()
    file, named = RESULTS / f"quality_{arguments.table}.json", TABLES[arguments.table]
    if not arguments.show:
        if arguments.source is None or arguments.work is None:
            parser.error("--source and --work are needed, unless --show is given")
        found = measure(named, arguments, file)
        file.write_text(json.dumps(found, indent=1) + "\n")
    print(table(json.loads(file.read_text())))


def measure(named: Table, arguments: argparse.Namespace, file: Path) -> dict[str, Any]:
    """The report with what was asked for run anew; what the file says of the rest stays."""
    chosen: Sequence[Trained | None]
    report: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"rows": {}}
    orders = arguments.orders or named.orders
    rows = [row for row in named.rows if arguments.rows is None or row.recipe in arguments.rows]
    cells = [Cell(named.dataset, row, order, arguments.work) for row in rows for order in orders]
    for cell in cells:
        cell.prepare(arguments.source)
    if arguments.last_pass:
        chosen, passes = [None] * len(cells), [cell.last_pass for cell in cells]
    else:
        chosen = train_all([cell.choosing() for cell in cells], arguments.jobs)
        passes = [cell.best_pass(each) for cell, each in zip(cells, chosen, strict=True)]
    tests = [(i, seed) for i in range(len(cells)) for seed in range(arguments.seeds)]
    tested = train_all([cells[i].testing(seed, passes[i]) for i, seed in tests], arguments.jobs)
    for i, cell in enumerate(cells):
        own = [each for (j, _), each in zip(tests, tested, strict=True) if j == i]
        entry = report["rows"].setdefault(cell.row.recipe, {"published": cell.row.published, "orders": {}})
        entry["orders"][cell.order] = cell.result(chosen[i], passes[i], own)
    return report


@dataclass(frozen=True, slots=True)
class Cell:
    """A row in one order of ties: its data sets and its trainings."""

    dataset: str
    row: Row
    order: str
    work: Path

    def prepare(self, source: Path) -> None:
        """Both data sets: without the last events, and with them."""
        for drop in (1, 0):
            cut = ("--ties", self.order, "--drop-last", str(drop), *self.row.prepare)
            prepare(self.data(drop), [self.dataset, "--source", str(source), *cut])

    def data(self, drop: int) -> Path:
        """The data set without so many of each user's last events."""
        kind = "".join(self.row.prepare).replace("--", "-").strip("-")
        return self.work / "data" / f"{self.order}-{drop}-{kind}"

    def choosing(self) -> Training:
        """The training that is evaluated on the last event but one."""
        return self._training("choose", self.data(1), 0, self._steps(self.data(1), self.row.every_passes))

    def testing(self, seed: int, passes: float) -> Training:
        """A training that is evaluated on the last event, first after so many passes."""
        return self._training(f"test-{seed}", self.data(0), seed, self._steps(self.data(0), passes))

    def best_pass(self, chosen: Trained) -> float:
        """Passes after which the choosing run was best."""
        best = max(chosen.evaluations, key=lambda line: float(line[CHOSEN_BY]))
        return self._passes(self.data(1), best["step"])

    @property
    def last_pass(self) -> float:
        """Passes of the recipe."""
        return float(load_recipe(self.row.recipe).data.num_epochs)

    def result(self, chosen: Trained | None, passes: float, tested: Sequence[Trained]) -> dict[str, Any]:
        """What the report says of this cell."""
        step = self._steps(self.data(0), passes)
        lines = [_line(each, step) for each in tested]
        validated = () if chosen is None else chosen.evaluations
        return {
            "date": datetime.date.today().isoformat(),
            "commit": commit(),
            "hardware": hardware(),
            "pass": round(passes, 1),
            "validation": {
                f"{self._passes(self.data(1), line['step']):.1f}": [line[name] for name in METRICS]
                for line in validated
            },
            "test": {name: [line[name] for line in lines] for name in METRICS},
            "seconds": [each.seconds for each in tested],
        }

    def _training(self, name: str, data: Path, seed: int, every: int) -> Training:
        run = self.work / "runs" / f"{self.row.recipe}-{self.order}-{name}"
        settings = (f"data.path={data}", f"evaluation.every_steps={every}", *seeded(seed), *self.row.settings)
        return Training(recipe=self.row.recipe, run=run, settings=settings)

    def _steps(self, data: Path, passes: float) -> int:
        return round(passes * self._samples(data) / self._batch)

    def _passes(self, data: Path, step: int) -> float:
        return step * self._batch / self._samples(data)

    def _samples(self, data: Path) -> int:
        return read_dataset_info(str(data)).splits["train"].samples

    @property
    def _batch(self) -> int:
        return load_recipe(self.row.recipe).data.global_batch_size


def _line(trained: Trained, step: int) -> Mapping[str, Any]:
    """The evaluation after this step; a run's last one where it ended before."""
    return next((line for line in trained.evaluations if line["step"] == step), trained.evaluations[-1])


def commit() -> str:
    """The code's, with a + where files differ from it."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=10"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return found or "unknown"


def table(report: Mapping[str, Any]) -> str:
    """The report as a table in Markdown: means over the seeds with their standard deviation."""
    lines = [
        "| recipe | ties | pass | on the last event but one | seeds | HR@10 | NDCG@10 | HR@50 | MRR | published | s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in report["rows"].items():
        for order, cell in row["orders"].items():
            validated = cell["validation"].get(f"{cell['pass']:.1f}")
            published = row["published"] if order == "gr" else None
            cells = [name, order, f"{cell['pass']:g}", _pair(validated), str(len(cell["seconds"]))]
            cells += [_cell(cell["test"][metric]) for metric in METRICS] + [_pair(published)]
            cells.append(f"{mean(cell['seconds']):.0f}" if cell["seconds"] else "")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _pair(values: Sequence[float] | None) -> str:
    """HR@10 and NDCG@10."""
    return " / ".join(map(_four, values[:2])) if values else ""


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" +- {_four(stdev(values))}" if len(values) > 1 else ""
    return _four(mean(values)) + spread


def _four(value: float) -> str:
    return f"{value:.4f}".removeprefix("0")


if __name__ == "__main__":
    main()
