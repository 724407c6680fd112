"""Does a ranker for one's own log beat the rates of items and users, on logs of any kind and size, as it comes?

Run: python -m benchmarks.own_log --work DIR [--kuairand DIR --movielens DIR] [--jobs 4]
     python -m benchmarks.own_log --table benchmarks/results/own_log.json

Each log is prepared and the recipe `own_log` trained as the README says, with no setting but paths and seeds.  A log's
rows are its actions with at least 200 positives in the evaluation split.  The publishers' logs are left out where their
folders are not given; what lies prepared under DIR is used again.
"""

import argparse
import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import pyarrow.parquet as pq
import torch

from benchmarks.made_up.logs import KINDS
from benchmarks.measured_on import device
from benchmarks.quality.trainings import Training, prepare, seeded, train_all
from pipelines.baseline import baseline_scores
from pipelines.config import DataConfig
from pipelines.reading.loader import dataset_info
from trainer.evaluation.metrics import score

SEEDS = (0, 1, 2)
MIN_POSITIVES = 200
MADE_UP = (("interests", 30_000), ("funnel", 30_000), ("items", 30_000), ("items", 100_000))
MADE_UP_COLUMNS = ("--user-column", "user", "--item-column", "item", "--time-column", "at", "--action-columns")


@dataclass(frozen=True, kw_only=True, slots=True)
class Log:
    """A log of the table."""

    name: str
    """What the table calls it."""
    prepare: tuple[str, ...]
    """Arguments of `pipelines.prepare`, but for --out."""
    settings: tuple[str, ...] = ()
    """Settings of the training, where the log needs any."""


def main() -> None:
    parser = argparse.ArgumentParser(description="The recipe own_log beside the rates of items and users.")
    parser.add_argument("--work", type=Path, help="folder for logs, prepared data and runs")
    parser.add_argument("--kuairand", type=Path, help="folder with KuaiRand-Pure's files")
    parser.add_argument("--movielens", type=Path, help="folder with MovieLens-1M's files")
    parser.add_argument("--only", nargs="+", help="names of logs; all if not given")
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/own_log.json"), help="keeps other logs")
    parser.add_argument("--table", type=Path, help="print the table of this file, and do nothing else")
    arguments = parser.parse_args()
    if arguments.table is not None:
        print(table(json.loads(arguments.table.read_text())))
        return
    if arguments.work is None:
        parser.error("--work is needed, unless --table is given")
    logs = [log for log in _logs(arguments) if arguments.only is None or log.name in arguments.only]
    for log in logs:
        prepare(arguments.work / "data" / _folder(log), log.prepare)
    runs = iter(train_all([_training(log, seed, arguments.work) for log in logs for seed in SEEDS], arguments.jobs))
    results = [_compare(log, [next(runs).evaluations[-1] for _ in SEEDS], arguments.work) for log in logs]
    report = merged(arguments.json, results)
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))


def merged(file: Path, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The report with these logs; what the file says of others stays."""
    known = json.loads(file.read_text())["logs"] if file.is_file() else []
    logs = {log["name"]: log for log in [*known, *results]}
    return {"seeds": list(SEEDS), "logs": list(logs.values())}


def table(report: Mapping[str, Any]) -> str:
    """The report as a table in Markdown: means over the seeds, and the smallest gain of any seed."""
    lines = [
        "| log | action | positives | NE | of the rates | AUC | of the rates | gain | least of the seeds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for log in report["logs"]:
        for action, values in log["actions"].items():
            base_ne, base_auc = values["baseline"]["ne"], values["baseline"]["auc"]
            gains = [auc - base_auc for auc in values["auc"]]
            lines.append(
                f"| {log['name']} | {action} | {values['positives']:,} | {mean(values['ne']):.3f} | {base_ne:.3f} | "
                f"{mean(values['auc']):.3f} | {base_auc:.3f} | {mean(gains):+.3f} | {min(gains):+.3f} |"
            )
    return "\n".join(lines)


def _logs(arguments: argparse.Namespace) -> list[Log]:
    """The logs that can be had."""
    logs = []
    if arguments.kuairand is not None:
        logs.append(Log(name="KuaiRand-Pure", prepare=("kuairand", "--source", str(arguments.kuairand))))
    if arguments.movielens is not None:
        # A film that is in the log was rated: nothing to predict.
        graded = [f"rated_{stars}" for stars in ("2_or_more", "3_or_more", "4_or_more", "5")]
        logs.append(
            Log(
                name="MovieLens-1M",
                prepare=("movielens", "--source", str(arguments.movielens)),
                settings=("model.labels=" + json.dumps([{"name": name} for name in graded]),),
            )
        )
    for kind, size in MADE_UP:
        folder = arguments.work / "logs" / f"{kind}-{size}"
        actions = "view,cart,buy" if kind == "funnel" else "click,like,buy"
        columns = ("event_log", "--source", str(folder), *MADE_UP_COLUMNS, actions)
        logs.append(Log(name=f"made up: {kind}, {size:,} events", prepare=columns))
        if not folder.is_dir():
            folder.mkdir(parents=True)
            pq.write_table(KINDS[kind](size, 0), folder / "log.parquet")
    return logs


def _folder(log: Log) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in log.name)


def _training(log: Log, seed: int, work: Path) -> Training:
    settings = (f"data.path={work / 'data' / _folder(log)}", *seeded(seed), *log.settings)
    return Training(recipe="own_log", run=work / "runs" / f"{_folder(log)}-{seed}", settings=settings)


def _compare(log: Log, seeds: Sequence[Mapping[str, float]], work: Path) -> dict[str, Any]:
    """The actions with enough positives: each seed's metrics, and those of the rates."""
    config = DataConfig(
        path=str(work / "data" / _folder(log)), global_batch_size=1, max_history_len=1, reader_threads=0
    )
    info = dataset_info(config)
    tasks = tuple(action for action in info.actions if f"auc/{action}" in seeds[0])
    rates = baseline_scores(config, info, tasks)
    logits, labels, users = (torch.from_numpy(values) for values in (rates.logits, rates.labels, rates.user_id))
    base = score(logits, labels, users, tasks)
    positives = dict(zip(tasks, rates.labels.sum(axis=0), strict=True))
    return {
        "name": log.name,
        "date": datetime.date.today().isoformat(),
        "hardware": device(),
        "candidates": {split: sizes.candidates for split, sizes in info.splits.items()},
        "actions": {
            task: {
                "positives": int(positives[task]),
                "baseline": {"ne": base[f"ne/{task}"], "auc": base[f"auc/{task}"]},
                "ne": [found[f"ne/{task}"] for found in seeds],
                "auc": [found[f"auc/{task}"] for found in seeds],
            }
            for task in tasks
            if positives[task] >= MIN_POSITIVES
        },
    }


if __name__ == "__main__":
    main()
