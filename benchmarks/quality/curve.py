"""A recipe at its own size, trained to its end on a made-up stream: how its loss falls, and what it knows in the end.

The stream (`pipelines.synthetic`) has the shape of the data that the recipe is for: as many items, histories and
candidates; what is to be learnt is planted, so the figures say that a model of this size learns, not what it would on
the publisher's data.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.quality.trainings import Asked, Training, seeded, train_all
from pipelines.config import SYNTHETIC_PATH

LABEL = "match"


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One training."""

    recipe: str
    settings: tuple[str, ...]
    """Over the recipe's: the stream, and what follows from it."""

    @property
    def names(self) -> tuple[str, ...]:
        """The name of the only row."""
        return (self.recipe,)

    def measure(self, asked: Asked, report: dict[str, Any]) -> None:
        """Train it once and put what ended into the report."""
        training = self.training(asked)
        (trained,) = train_all([training], asked.jobs, asked.limit_s)
        if trained.seconds is None:
            return
        report["rows"] = {
            self.recipe: {
                "date": datetime.date.today().isoformat(),
                "commit": [trained.commit],
                "hardware": [trained.hardware],
                "settings": list(training.settings),
                "seconds": trained.seconds,
                "curve": curve(training.run / "metrics.jsonl"),
                "evaluation": {kind: trained.evaluations[-1][f"{kind}/{LABEL}"] for kind in ("ne", "auc")},
            }
        }

    def training(self, asked: Asked) -> Training:
        """The recipe's run of seed 0."""
        return Training(
            recipe=self.recipe,
            run=asked.work / "runs" / self.recipe,
            settings=(*self.settings, *seeded(0), *asked.settings),
        )

    def table(self, report: Mapping[str, Any]) -> str:
        """The report in Markdown: a row for every doubling of what was seen, then the evaluation."""
        lines = ["| samples seen | loss since the row above | NE | AUC |", "| --- | --- | --- | --- |"]
        for row in report["rows"].values():
            lines += [
                f"| {point['samples']:,} | {point['loss']:.4f} | {point['ne']:.4f} | {point['auc']:.4f} |"
                for point in row["curve"]
            ]
            found = row["evaluation"]
            lines.append(
                f"| evaluation, after {row['seconds']:.0f} s in all | | {found['ne']:.4f} | {found['auc']:.4f} |"
            )
        return "\n".join(lines)


def curve(file: Path) -> list[dict[str, float]]:
    """The mean loss between doublings of the samples seen, and the windowed metrics at each, from a run's metrics."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    points, since = [], []
    for line, following in zip(lines, [*lines[1:], None], strict=True):
        since.append(line["loss"])
        # The last line of each doubling of the first, and the last of all.
        if following is None or _doublings(lines, following) > _doublings(lines, line):
            points.append(
                {
                    "samples": line["samples"],
                    "loss": mean(since),
                    **{kind: line[f"{kind}/{LABEL}"] for kind in ("ne", "auc")},
                }
            )
            since = []
    return points


def _doublings(lines: Sequence[Mapping[str, Any]], line: Mapping[str, Any]) -> int:
    return ((int(line["samples"]) - 1) // int(lines[0]["samples"])).bit_length()


# Yambda's items and candidates; histories as long as its users' in the middle, and up to what the recipe reads.
_YAMBDA = {
    **{"num_users": 65_536, "num_items": 9_390_624, "item_exponent": 1.2, "num_candidates": 100},
    **{"min_len": 1024, "max_len": 16_384, "lag": 64, "lag_until": 16_384},
}
YAMBDA = Curve(
    recipe="yambda_ultra",
    settings=(
        f"data.path={SYNTHETIC_PATH}",
        *(f"data.synthetic.{key}={value}" for key, value in _YAMBDA.items()),
        f'model.labels=[{{"name": "{LABEL}"}}]',
        # For one GPU, and so few steps.
        "data.global_batch_size=32",
        "schedule.warmup_steps=200",
        "sparse_optimizer.learning_rate=0.02",
        "evaluation.baseline=false",
        "checkpoint.every_steps=null",
        "checkpoint.asynchronous=false",
    ),
)
"""ULTRA-HSTU's 18 layers of width 512 on 16,384 events."""
