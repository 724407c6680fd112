"""Next-item tables: retrievers on a public data set, each in a stated protocol, with several seeds.

Of every row and order of ties the pass is chosen on each user's last event but one: the recipe is trained on the data
without the last events (`prepare --drop-last 1`), evaluated every few passes, and the pass with the best NDCG@10
counts.  Beside that it is trained on all but the last events, once a seed, evaluated after the same passes, and read at
that one alone.  Where nothing is chosen the recipe's last pass counts.  A test that was cut off before its pass is left
out.
"""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.quality.trainings import (
    Asked,
    Trained,
    Training,
    folder_of,
    prepare,
    score_all,
    seeded,
    train_all,
    with_known_seeds,
)
from pipelines.storage.dataset_json import read_dataset_info
from trainer.recipes import load_recipe

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
    published: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """HR@10 and NDCG@10 of an order of ties that its authors print, for our own recipe the best of anyone."""
    trained_as: str | None = None
    """The row whose trainings are scored on this row's data, in their last state; null for trainings of its own."""

    @property
    def name(self) -> str:
        """What the table calls it."""
        return f"{self.recipe}, {self.other}" if self.other else self.recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class NextItem:
    """Recipes in one protocol."""

    dataset: str
    """What `pipelines.prepare` calls the publisher."""
    orders: tuple[str, ...]
    """Orders of events of one second that are tried, as `--ties` names them."""
    rows: tuple[Row, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the rows."""
        return tuple(row.name for row in self.rows)

    def measure(self, asked: Asked, report: dict[str, Any]) -> None:
        """Run what was asked for and put it into the report; what that says of the rest stays."""
        orders = asked.orders or self.orders
        cells = [self._cell(row, order, asked) for row in self.rows if row.name in asked.rows for order in orders]
        for cell in cells:
            cell.prepare(asked.source, drops=(0,) if asked.last_pass else (1, 0))
        scored = [cell for cell in cells if cell.row.trained_as is not None and asked.last_pass]
        cells = [cell for cell in cells if cell.row.trained_as is None]
        choosing = [] if asked.last_pass else [cell.choosing() for cell in cells]
        tests = [cell.testing(seed) for seed in asked.of_seeds for cell in cells]
        trained = train_all([*choosing, *tests], asked.jobs, asked.limit_s)
        side_by_side = min(asked.jobs, len(trained))
        chosen, tested = trained[: len(choosing)], trained[len(choosing) :]
        results = []
        for i, cell in enumerate(cells):
            by_seed = dict(zip(asked.of_seeds, tested[i :: len(cells)], strict=True))
            results.append((cell, cell.result(chosen[i] if chosen else None, by_seed)))
        for cell in scored:
            (row,) = (row for row in self.rows if row.name == cell.row.trained_as)
            trainings = [self._cell(row, cell.order, asked).testing(seed) for seed in asked.of_seeds]
            by_seed = dict(zip(asked.of_seeds, score_all(trainings, cell.data(0), asked.jobs), strict=True))
            results.append((cell, cell.result(None, by_seed)))
        rows = report.setdefault("rows", {})
        for cell, found in results:
            if found["validation"] or found["test"][CHOSEN_BY]:
                of_orders = rows.setdefault(cell.row.name, {"orders": {}})["orders"]
                known = of_orders.get(cell.order)
                # Figures of another pass belong to another choice.
                known = known if known is not None and known["pass"] == found["pass"] else None
                joined = with_known_seeds(found, known, ("test", "seconds"))
                of_orders[cell.order] = {**joined, "side_by_side": side_by_side}
        report["rows"] = {name: rows[name] for name in self.names if name in rows}

    def _cell(self, row: "Row", order: str, asked: Asked) -> "Cell":
        return Cell(self.dataset, row, order, asked.work, asked.settings)

    def table(self, report: Mapping[str, Any]) -> str:
        """The report in Markdown: means over the seeds with their standard deviation."""
        lines = [
            "| recipe | ties | pass | on the last event but one | seeds | HR@10 | NDCG@10 | HR@50 | MRR | published | "
            "s, runs side by side |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        published = {(row.name, order): pair for row in self.rows for order, pair in row.published.items()}
        for name, row in report["rows"].items():
            for order, cell in row["orders"].items():
                cells = [name, order, str(cell["pass"]), _pair(cell["validation"].get(str(cell["pass"])))]
                cells.append(str(len(cell["seeds"])))
                cells += [_cell(cell["test"][metric]) for metric in METRICS] + [_pair(published.get((name, order)))]
                seconds = [each for each in cell["seconds"] if each is not None]
                cells.append(f"{mean(seconds):.0f}, {cell['side_by_side']}" if seconds else "")
                lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Cell:
    """A row in one order of ties: its data sets and its trainings."""

    dataset: str
    row: Row
    order: str
    work: Path
    trial: tuple[str, ...] = ()
    """Settings over the row's."""

    def prepare(self, source: Path, *, drops: Sequence[int]) -> None:
        """Its data sets without so many of each user's last events."""
        for drop in drops:
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

    def result(self, chosen: Trained | None, tested: Mapping[int, Trained]) -> dict[str, Any]:
        """What the report says: of tests, by seed, those that came to the chosen pass, or without one to their end."""
        validated = {} if chosen is None else self._by_pass(chosen)
        passes = max(validated, key=lambda each: float(validated[each][CHOSEN_BY])) if validated else self._last_pass
        read = {
            seed: (each, found)
            for seed, each in tested.items()
            if (found := self._by_pass(each).get(passes)) is not None
        }
        return {
            "date": datetime.date.today().isoformat(),
            "commit": sorted({each.commit for each, _ in read.values()}),
            "hardware": sorted({each.hardware for each, _ in read.values()}),
            "settings": [*self.row.settings, *self.trial],
            "seeds": list(read),
            "pass": passes,
            "validation": {str(each): [line[name] for name in METRICS] for each, line in validated.items()},
            "test": {name: [found[name] for _, found in read.values()] for name in METRICS},
            "seconds": [each.seconds for each, _ in read.values()],
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
        return folder_of(self.row.name)

    @property
    def _last_pass(self) -> int:
        return load_recipe(self.row.recipe).data.num_epochs


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


_WHOLE = ("--leave-last", "1", "--candidates", "1")
_PIECES = ("--leave-last", "1", "--samples-per-user", "0", "--candidates", "199", "--train-history", "1")
# The recipe's settings before they were chosen on the last ten events but one.
_HALF_ITS_RATES = (
    "model.layer.initial_std=null",
    "model.layer.dropout=0.2",
    "model.input.dropout=0.4",
    "sparse_optimizer.learning_rate=1e-3",
    "optimizer.learning_rate=1e-3",
)


def _longview(other: str = "", settings: tuple[str, ...] = ()) -> tuple[Row, Row]:
    """Our recipe with all that a user has rated left out of the ranking, and the same trainings ranked as published."""
    whole = Row(
        recipe="ml1m_longview",
        other=other,
        prepare=(*_PIECES, "--max-history", "2400"),
        settings=settings,
        # The best that was published: RAILS (github.com/bailuding/rails).
        published={"gr": (0.3474, 0.1999)},
    )
    known = ", ".join(filter(None, (other, "199 films known")))
    return whole, replace(whole, other=known, prepare=(*_PIECES, "--max-history", "199"), trained_as=whole.name)


# Published are GR's own (github.com/meta-recsys/generative-recommenders).  In the file's order nothing is that could be
# compared: github.com/blondered/transformer_benchmark holds out the first of a user's last second in it, not the last.
ML1M = NextItem(
    dataset="movielens",
    orders=("gr", "log"),
    rows=(
        Row(recipe="ml1m_sasrec", prepare=_WHOLE, published={"gr": (0.2853, 0.1603)}),
        Row(recipe="ml1m_hstu", prepare=_WHOLE, published={"gr": (0.3097, 0.1720)}),
        Row(recipe="ml1m_hstu_large", prepare=_WHOLE, published={"gr": (0.3294, 0.1893)}),
        *_longview(),
        *_longview("half its rates", _HALF_ITS_RATES),
    ),
)
"""MovieLens-1M: each user's last film among all films."""
