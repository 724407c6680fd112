"""Which checkpoints are kept."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from trainer.config import CheckpointConfig


def superfluous(
    steps: list[int], config: CheckpointConfig, also: Iterable[int | None], base: Callable[[int], int | None]
) -> list[int]:
    """Which of the complete `steps` (oldest first) may be deleted, newest first: `config` does not keep them, they are
    not in `also`, and no checkpoint that is kept needs them as its `base`."""
    kept = set(steps[-config.keep :]) | (set(also) & set(steps))
    if config.keep_every_steps is not None:
        kept |= {step for step in steps if step % config.keep_every_steps == 0}
    kept |= {base(step) for step in kept if step is not None}
    return [step for step in reversed(steps) if step not in kept]


def best_step(eval_file: Path, metric: str | None, steps: Iterable[int]) -> int | None:
    """The step of `steps` whose line of eval.jsonl has the best `metric`, `max:NAME` or `min:NAME`, the newest of
    equal ones; None where there is none."""
    if metric is None or not eval_file.is_file():
        return None
    direction, _, name = metric.partition(":")
    sign = 1.0 if direction == "max" else -1.0
    lines = [json.loads(line) for line in eval_file.read_text().splitlines()]
    values = {line["step"]: sign * line[name] for line in lines if line.get(name) is not None}
    found = [step for step in steps if step in values]
    return max(found, key=lambda step: (values[step], step)) if found else None
