"""Files of one JSON object a line, each with a `step`, as crashes leave them: appended to, read, cut back."""

import json
import logging
import math
from pathlib import Path
from typing import Any

from trainer.run.writing import replace_text, written

logger = logging.getLogger(__name__)


class JsonLines:
    """A file of one JSON object a line, appended to, in which no step appears twice."""

    def __init__(self, path: Path) -> None:
        """Drops the end of the file from the first line on that a crash left torn or empty.

        Raises:
            ValueError: a line in the middle is no object with a step.
        """
        self._path = path
        lines, rest = whole_lines(path)
        if rest:
            logger.warning("%s ended in the middle of a line, which is dropped", path)
            replace_text(path, "".join(lines))
        self._steps: set[int] = {json.loads(line)["step"] for line in lines}

    def append(self, record: dict[str, Any]) -> bool:
        """Write `record` and flush, unless its step is in the file; returns whether it was written.

        An undefined number (NaN) becomes null, for JSON has no other word for it.
        """
        if record["step"] in self:
            return False
        values = {key: None if value != value else value for key, value in record.items()}
        with written(self._path), self._path.open("a") as file:
            file.write(json.dumps(values, allow_nan=False) + "\n")
        self._steps.add(record["step"])
        return True

    def __contains__(self, step: int) -> bool:
        return step in self._steps


def forget_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the lines of steps after `step` from a file of JSON lines, and return their objects.

    A run that goes on from a checkpoint takes those steps again; its lines say what led to its state.  What a power cut
    has torn out of later ones, as file servers' clients write pages in any order, is no loss.

    Raises:
        ValueError: as `whole_lines`, but for lines of steps after `step`.
    """
    lines, rest = whole_lines(path, step)
    objects = [json.loads(line) for line in lines]
    if rest or any(values["step"] > step for values in objects):
        kept = [line for line, values in zip(lines, objects, strict=True) if values["step"] <= step]
        replace_text(path, "".join(kept))
    return [values for values in objects if values["step"] > step]


def whole_lines(path: Path, saved: float = math.inf) -> tuple[list[str], list[str]]:
    """(lines up to the first that is no object with a step, the rest), each with its end.

    Raises:
        ValueError: a sound line of a step up to `saved` follows an unsound one, which no crash leaves behind.
    """
    lines = path.read_text(errors="replace").splitlines(keepends=True) if path.is_file() else []
    sound = [line.endswith("\n") and _has_step(line) for line in lines]
    count = sound.index(False) if False in sound else len(lines)
    behind = [json.loads(line) for line, whole in zip(lines[count:], sound[count:], strict=True) if whole]
    if any(values["step"] <= saved for values in behind):
        raise ValueError(f"{path}, line {count + 1}, is not a JSON object with a step: mend or remove that line")
    return lines[:count], lines[count:]


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a file's whole lines; raises ValueError as `whole_lines` does."""
    return [json.loads(line) for line in whole_lines(path)[0]]


def _has_step(line: str) -> bool:
    try:
        values = json.loads(line)
    except ValueError:
        return False
    return isinstance(values, dict) and isinstance(values.get("step"), int)
