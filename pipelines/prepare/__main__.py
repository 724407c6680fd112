"""The command `python -m pipelines.prepare DATASET --source DIR --out DIR [options]`.

Exit status: 0 done, 1 failed, 2 wrong use.
"""

import argparse
import ast
import inspect
import logging
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import duckdb

from pipelines.prepare.extension import extend
from pipelines.prepare.log import event_log
from pipelines.prepare.log.event_log import EventLogOptions
from pipelines.prepare.options import SampleOptions
from pipelines.prepare.publishers import amazon, kuairand, movielens, yambda
from pipelines.prepare.publishers.movielens import MovielensOptions
from pipelines.prepare.samples.stages import Load, prepare

DATASETS: Mapping[str, Load] = {
    "amazon2014": amazon.load_2014,
    "amazon2018": amazon.load_2018,
    "amazon2023": amazon.load_2023,
    "kuairand": kuairand.load,
    "yambda": yambda.load,
}
"""Formats that leave nothing open."""
FORMATS: Mapping[str, tuple[type, Callable[[Any], Load]]] = {
    "event_log": (EventLogOptions, event_log.loader),
    "movielens": (MovielensOptions, movielens.loader),
}
"""Formats with options of their own."""


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
    own = {field.name: values.pop(field.name) for options, _ in FORMATS.values() for field in fields(options)}
    given = {name: value for name, value in own.items() if value is not None}
    try:
        if (out is None) == ("extend" not in given):
            raise ValueError("give --out, the folder to create, or for event_log --extend, the data set to add to")
        options = SampleOptions(**values)
        load = _choose(dataset, given)
    except ValueError as error:
        parser.error(str(error))
    try:
        if out is None:
            extend(load, source, Path(given["extend"]), values)
        else:
            prepare(load, source, out, options)
    except (ValueError, OSError, duckdb.Error) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _choose(dataset: str, given: Mapping[str, str]) -> Load:
    """The data set's module; options of a format are for that format alone."""
    if dataset in DATASETS:
        options, known = None, set()
    else:
        options, loader = FORMATS[dataset]
        known = {field.name for field in fields(options)}
    foreign = [_flag(name) for name in given if name not in known]
    if foreign:
        raise ValueError(f"{', '.join(foreign)} has no effect on {dataset}")
    if options is None:
        return DATASETS[dataset]
    missing = [_flag(field.name) for field in fields(options) if field.default is MISSING and field.name not in given]
    if missing:
        raise ValueError(f"{dataset} needs {', '.join(missing)}")
    return loader(options(**given))


def _flag(name: str) -> str:
    """The option of a field."""
    return f"--{name.replace('_', '-')}"


def _parser() -> OneLineParser:
    """One option for every field of SampleOptions and of the formats' own."""
    parser = OneLineParser(prog="python -m pipelines.prepare", description=__doc__, allow_abbrev=False)
    parser.add_argument("dataset", choices=sorted([*DATASETS, *FORMATS]), help="format of the source")
    parser.add_argument("--source", type=Path, required=True, metavar="DIR", help="folder with the publisher's files")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to create; or --extend")
    hints, texts = get_type_hints(SampleOptions), _explanations(SampleOptions)
    for field in fields(SampleOptions):
        kind = next((part for part in get_args(hints[field.name]) if part is not type(None)), hints[field.name])
        default = "" if field.default in (None, "") else f" Default {field.default}."
        text = texts[field.name] + default
        name = _flag(field.name)
        if kind is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            parser.add_argument(name, type=kind, default=argparse.SUPPRESS, metavar=_metavar(name, kind), help=text)
    for dataset, (options, _) in FORMATS.items():
        texts, group = _explanations(options), parser.add_argument_group(f"options of {dataset} alone")
        for field in fields(options):
            name, text = _flag(field.name), texts[field.name]
            if field.type is bool:
                group.add_argument(name, action="store_true", default=None, help=text)
            else:
                group.add_argument(name, metavar=_metavar(name, str), help=text)
    return parser


def _metavar(flag: str, kind: type) -> str:
    """What stands behind an option in the help: N, X, or the last word of a name."""
    return {int: "N", float: "X"}.get(kind, flag.rpartition("-")[2].upper())


def _explanations(options: type) -> dict[str, str]:
    """The docstring of each field of a dataclass, which only its source holds; other fields are called as options."""
    [definition] = ast.parse(inspect.getsource(options)).body
    assert isinstance(definition, ast.ClassDef)
    texts = {}
    for field, text in pairwise(definition.body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            # A percent sign would begin a field of argparse's own.
            texts[ast.unparse(field.target)] = " ".join(ast.literal_eval(text.value).split()).replace("%", "%%")
    # Words with an underscore are nothing but names.
    return {
        field: re.sub(r"\w+_\w+", lambda word: _flag(word[0]) if word[0] in texts else word[0], text)
        for field, text in texts.items()
    }


if __name__ == "__main__":
    sys.exit(main())
