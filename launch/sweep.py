"""Many runs of a recipe, one for each combination of values: `--set model.dim=256,512 seed=0..4` is ten."""

import itertools
import re
import zlib
from dataclasses import replace
from pathlib import Path

from launch.request import Request

MAX_RUNS = 1000
"""Slurm's default limit of a job array."""


def runs_of(request: Request) -> list[Request]:
    """A request a combination, with a run directory of its own in the sweep's.

    Raises:
        ValueError: no override names several values, there are too many runs, or they would share a store.
    """
    choices = [[f"{key}={value}" for value in values_of(text)] for key, _, text in map(_split, request.overrides)]
    combinations = list(itertools.islice(itertools.product(*choices), MAX_RUNS + 1))
    if len(combinations) < 2:
        raise ValueError("a sweep needs an override with several values, as --set model.dim=256,512 or seed=0..4")
    if len(combinations) > MAX_RUNS:
        raise ValueError(f"the sweep has more than {MAX_RUNS} runs: sweep over fewer values at a time")
    shared = [values[0] for values in choices if len(values) == 1 and values[0].startswith("checkpoint.store=")]
    if shared and not shared[-1].endswith("=null"):
        raise ValueError(
            f"{shared[-1]} would be the store of every run of the sweep, and a store is for one: leave it out, and "
            "each has its checkpoints in its own directory"
        )
    swept = [number for number, values in enumerate(choices) if len(values) > 1]
    sweep_dir = request.run_dir or Path("runs", f"{request.recipe}-sweep")
    return [
        replace(request, run_dir=sweep_dir / _name([chosen[number] for number in swept]), overrides=list(chosen))
        for chosen in combinations
    ]


def values_of(text: str) -> list[str]:
    """The values of one override: A..B is every whole number from A to B, commas outside of JSON's brackets and quotes
    separate, and a list in brackets is one value."""
    numbers = re.fullmatch(r"(-?\d+)\.\.(-?\d+)", text)
    if numbers:
        first, last = int(numbers[1]), int(numbers[2])
        return [str(number) for number in range(first, last + 1)]
    values, depth, quoted = [""], 0, False
    for character in text:
        quoted ^= character == '"'
        if not quoted:
            depth += (character in "[{") - (character in "]}")
        if character == "," and not depth and not quoted:
            values.append("")
        else:
            values[-1] += character
    return values


def _split(override: str) -> tuple[str, str, str]:
    key, equals, text = override.partition("=")
    if not equals or not text:
        raise ValueError(f"override {override!r} is not of the form key=value")
    return key, equals, text


def _name(chosen: list[str]) -> str:
    """A folder's name that says what the run is: `dim=256,seed=0`."""
    words = []
    for override in chosen:
        key, _, value = override.partition("=")
        plain = value if re.fullmatch(r"[\w.+-]{1,30}", value) else f"{zlib.crc32(value.encode()):08x}"
        words.append(f"{key.rpartition('.')[2]}={plain}")
    return ",".join(words)
