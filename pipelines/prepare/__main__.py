"""The command `python -m pipelines.prepare DATASET --source DIR --out DIR [options]`.

Exit status: 0 done, 1 failed, 2 wrong use.
"""

import argparse
import ast
import inspect
import logging
import sys
from collections.abc import Mapping
from dataclasses import MISSING, fields
from itertools import pairwise
from pathlib import Path
from typing import NoReturn, get_args, get_type_hints

import duckdb

from pipelines.prepare import amazon, event_log, kuairand, movielens, yambda
from pipelines.prepare.event_log import EventLogOptions
from pipelines.prepare.options import SampleOptions
from pipelines.prepare.stages import Load, prepare

DATASETS: Mapping[str, Load] = {
    "amazon2014": amazon.load_2014,
    "amazon2018": amazon.load_2018,
    "amazon2023": amazon.load_2023,
    "kuairand": kuairand.load,
    "movielens": movielens.load,
    "yambda": yambda.load,
}
EVENT_LOG = "event_log"


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Print the message and leave with the status of wrong use."""
        self.exit(2, f"error: {message}\n")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = _parser()
    values = vars(parser.parse_args(arguments))
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    dataset, source, out = (values.pop(name) for name in ("dataset", "source", "out"))
    log_values = {field.name: values.pop(field.name) for field in fields(EventLogOptions)}
    try:
        options = SampleOptions(**values)
        load = _choose(dataset, {name: value for name, value in log_values.items() if value is not None})
    except ValueError as error:
        parser.error(str(error))
    try:
        prepare(load, source, out, options)
    except (ValueError, OSError, duckdb.Error) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _choose(dataset: str, columns: Mapping[str, str]) -> Load:
    """The data set's module; the columns' names are for an event log alone."""
    given = ", ".join(f"--{name.replace('_', '-')}" for name in columns)
    if dataset != EVENT_LOG:
        if columns:
            raise ValueError(f"{given} has no effect on {dataset}, only on {EVENT_LOG}")
        return DATASETS[dataset]
    missing = [
        f"--{field.name.replace('_', '-')}"
        for field in fields(EventLogOptions)
        if field.default is MISSING and field.name not in columns
    ]
    if missing:
        raise ValueError(f"{EVENT_LOG} needs {', '.join(missing)}")
    return event_log.loader(EventLogOptions(**columns))


def _parser() -> OneLineParser:
    """One option for every field of SampleOptions and of EventLogOptions."""
    parser = OneLineParser(prog="python -m pipelines.prepare", description=__doc__, allow_abbrev=False)
    parser.add_argument("dataset", choices=sorted([*DATASETS, EVENT_LOG]), help="format of the source")
    parser.add_argument("--source", type=Path, required=True, help="folder with the publisher's files")
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    hints, texts = get_type_hints(SampleOptions), _explanations(SampleOptions)
    for field in fields(SampleOptions):
        kind = next((part for part in get_args(hints[field.name]) if part is not type(None)), hints[field.name])
        default = "" if field.default is None else f" Default {field.default}."
        text = texts[field.name] + default
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default, help=text)
    texts = _explanations(EventLogOptions)
    for field in fields(EventLogOptions):
        parser.add_argument(f"--{field.name.replace('_', '-')}", help=f"{EVENT_LOG} only. {texts[field.name]}")
    return parser


def _explanations(options: type) -> dict[str, str]:
    """The docstring of each field of a dataclass, which only its source holds."""
    [definition] = ast.parse(inspect.getsource(options)).body
    assert isinstance(definition, ast.ClassDef)
    texts = {}
    for field, text in pairwise(definition.body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            # A percent sign would begin a field of argparse's own.
            texts[ast.unparse(field.target)] = " ".join(ast.literal_eval(text.value).split()).replace("%", "%%")
    return texts


if __name__ == "__main__":
    sys.exit(main())
