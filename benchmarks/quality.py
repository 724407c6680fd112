"""Tables of quality: recipes on public data, each in a stated protocol, several seeds, from files to figures.

Run: python -m benchmarks.quality --table ml1m --source DIR --work DIR [--rows NAME ...] [--seeds 5] [--jobs 2]
     python -m benchmarks.quality --show

Of every row and order of ties the pass is chosen on each user's last event but one: the recipe is trained on the data
without the last events (`prepare --drop-last 1`), evaluated every few passes, and the pass with the best NDCG@10
counts.  Beside that it is trained on all but the last events, once a seed, evaluated after the same passes, and read at
that one alone.  With `--last-pass` nothing is chosen, and the recipe's last pass counts; with `--seeds 0` nothing is
tested, which is how settings are compared.

The result of a table goes to benchmarks/results/quality_NAME.json, where rows that were not run stay; docs/quality.md
shows it.  What is done under --work is used again.  Where `--limit-s` ends runs, what they had by then counts, and a
test that had not come to its pass is left out.
"""

import argparse
import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.trainings import Trained, Training, prepare, seeded, train_all
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
    other: str = ""
    """What `settings` make of the recipe, in words; empty without any."""
    every_passes: int = 10
    """Passes between two evaluations."""
    published: tuple[float, float] | None = None
    """HR@10 and NDCG@10 that its authors print, in the first order of ties."""

    @property
    def name(self) -> str:
        """What the table calls it."""
        return f"{self.recipe}, {self.other}" if self.other else self.recipe


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
_DRAWN = ("model.retrieval.num_negatives=128", "model.retrieval.share_negatives=false")

TABLES: Mapping[str, Table] = {
    "ml1m": Table(
        dataset="movielens",
        orders=("gr", "log"),
        rows=(
            Row(recipe="ml1m_sasrec", prepare=_WHOLE, published=(0.2853, 0.1603)),
            Row(recipe="ml1m_hstu", prepare=_WHOLE, published=(0.3097, 0.1720)),
            Row(recipe="ml1m_hstu", other="128 drawn films", prepare=_WHOLE, settings=_DRAWN),
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
    parser.add_argument("--rows", nargs="+", help="rows by name; all if not given")
    parser.add_argument("--orders", nargs="+", help="orders of ties; all if not given")
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each row that are tested")
    parser.add_argument("--last-pass", action="store_true", help="choose no pass: the recipe's last one counts")
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side")
    parser.add_argument("--limit-s", type=float, help="seconds after which no run begins or goes on")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="over all rows' settings: for trials")
    parser.add_argument("--out", type=Path, help="where the result goes and the rest of it comes from")
    parser.add_argument("--show", action="store_true", help="print the table of the result, and do nothing else")
    arguments = parser.parse_args()
    file, named = arguments.out or RESULTS / f"quality_{arguments.table}.json", TABLES[arguments.table]
    if not arguments.show:
        if arguments.source is None or arguments.work is None:
            parser.error("--source and --work are needed, unless --show is given")
        found = measure(named, arguments, file)
        file.write_text(json.dumps(found, indent=1) + "\n")
    print(table(json.loads(file.read_text())))


def measure(named: Table, arguments: argparse.Namespace, file: Path) -> dict[str, Any]:
    """The report with what was asked for run anew; what the file says of the rest stays."""
    report: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"rows": {}}
    rows = [row for row in named.rows if arguments.rows is None or row.name in arguments.rows]
    orders = arguments.orders or named.orders
    trial = tuple(arguments.set)
    cells = [Cell(named.dataset, row, order, arguments.work, trial) for row in rows for order in orders]
    for cell in cells:
        cell.prepare(arguments.source)
    choosing = [] if arguments.last_pass else [cell.choosing() for cell in cells]
    tests = [cell.testing(seed) for seed in range(arguments.seeds) for cell in cells]
    trained = train_all([*choosing, *tests], arguments.jobs, arguments.limit_s)
    chosen, tested = trained[: len(choosing)], trained[len(choosing) :]
    for i, cell in enumerate(cells):
        entry = report["rows"].setdefault(cell.row.name, {"published": cell.row.published, "orders": {}})
        found = cell.result(chosen[i] if chosen else None, tested[i :: len(cells)])
        entry["orders"][cell.order] = {**found, "side_by_side": arguments.jobs}
    order = [row.name for row in named.rows]
    report["rows"] = {name: report["rows"][name] for name in order if name in report["rows"]}
    return report


@dataclass(frozen=True, slots=True)
class Cell:
    """A row in one order of ties: its data sets and its trainings."""

    dataset: str
    row: Row
    order: str
    work: Path
    trial: tuple[str, ...] = ()
    """Settings over the row's."""

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
        return self._training("choose", self.data(1), 0)

    def testing(self, seed: int) -> Training:
        """A training that is evaluated on the last event."""
        return self._training(f"test-{seed}", self.data(0), seed)

    def result(self, chosen: Trained | None, tested: Sequence[Trained]) -> dict[str, Any]:
        """What the report says of this cell: tests that came to the chosen pass, or without one to their end."""
        validated = {} if chosen is None else self._by_pass(chosen)
        passes = max(validated, key=lambda each: float(validated[each][CHOSEN_BY])) if validated else self._last_pass
        read = [(each, found) for each in tested if (found := self._by_pass(each).get(passes)) is not None]
        return {
            "date": datetime.date.today().isoformat(),
            "commit": sorted({each.commit for each, _ in read}),
            "hardware": sorted({each.hardware for each, _ in read}),
            "settings": [*self.row.settings, *self.trial],
            "pass": passes,
            "validation": {str(each): [line[name] for name in METRICS] for each, line in validated.items()},
            "test": {name: [found[name] for _, found in read] for name in METRICS},
            "seconds": [each.seconds for each, _ in read if each.seconds is not None],
        }

    def _by_pass(self, trained: Trained) -> Mapping[int, Mapping[str, Any]]:
        """A run's evaluations by passes over its data, rounded."""
        every = self.row.every_passes
        found = {every * (number + 1): line for number, line in enumerate(trained.evaluations)}
        # A finished run's last evaluation is that of its end.
        if trained.seconds is not None:
            found = {**dict(list(found.items())[:-1]), self._last_pass: trained.evaluations[-1]}
        return found

    def _training(self, name: str, data: Path, seed: int) -> Training:
        run = self.work / "runs" / f"{self._folder}-{self.order}-{name}"
        samples = read_dataset_info(str(data)).splits["train"].samples
        every = round(self.row.every_passes * samples / load_recipe(self.row.recipe).data.global_batch_size)
        own = (f"data.path={data}", f"evaluation.every_steps={every}", *seeded(seed))
        return Training(recipe=self.row.recipe, run=run, settings=(*own, *self.row.settings, *self.trial))

    @property
    def _folder(self) -> str:
        return "".join(letter if letter.isalnum() else "_" for letter in self.row.name)

    @property
    def _last_pass(self) -> int:
        return load_recipe(self.row.recipe).data.num_epochs


def table(report: Mapping[str, Any]) -> str:
    """The report as a table in Markdown: means over the seeds with their standard deviation."""
    lines = [
        "| recipe | ties | pass | on the last event but one | seeds | HR@10 | NDCG@10 | HR@50 | MRR | published | "
        "s, runs side by side |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in report["rows"].items():
        for order, cell in row["orders"].items():
            validated = cell["validation"].get(str(cell["pass"]))
            published = row["published"] if order == "gr" else None
            cells = [name, order, str(cell["pass"]), _pair(validated), str(len(cell["test"][METRICS[0]]))]
            cells += [_cell(cell["test"][metric]) for metric in METRICS] + [_pair(published)]
            cells.append(f"{mean(cell['seconds']):.0f}, {cell['side_by_side']}" if cell["seconds"] else "")
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
