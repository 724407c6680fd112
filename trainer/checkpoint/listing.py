"""The checkpoints of a run as a table for a person; needs no torch."""

from trainer.checkpoint.catalogue import Catalogue, DamagedCheckpoint, step_folder
from trainer.checkpoint.manifest import OtherFormat
from trainer.command_line import WrongUse


def list_checkpoints(catalogue: Catalogue, *, verify: bool) -> tuple[list[str], bool]:
    """(lines to print, whether all is in order); with `verify` every byte is read, without it sizes are looked at."""
    lines, broken = [f"{'step':>10}{'GiB':>9}{'ranks':>7}{'samples':>14}  state"], set[int]()
    for step in catalogue.steps():
        try:
            manifest = (catalogue.verify if verify else catalogue.open)(step).manifest
        except (DamagedCheckpoint, OtherFormat, OSError) as problem:
            broken.add(step)
            lines.append(f"{step:>10}{'-':>9}{'-':>7}{'-':>14}  {problem}")
            continue
        state = ("verified" if verify else "complete") + (", pinned" if catalogue.is_pinned(step) else "")
        if manifest.base is not None:
            state += f", rows touched since step {manifest.base}"
            # Which is older, so it was looked at before.
            state += ", which is not in order: nor is this one" if manifest.base in broken else ""
        gib, samples = manifest.num_bytes / 2**30, manifest.progress.samples
        lines.append(f"{step:>10}{gib:>9.2f}{manifest.world_size:>7}{samples:>14,}  {state}")
    counted = set(map(step_folder, catalogue.steps()))
    lines += [f"{name} does not count as a checkpoint" for name in catalogue.store.folders() if name not in counted]
    return lines, not broken


def pin(catalogue: Catalogue, step: int, pinned: bool) -> None:
    """Let a checkpoint stay whatever retention says, or no longer.

    Raises:
        WrongUse: there is no complete checkpoint of `step`.
    """
    if step not in catalogue.steps():
        listed = ", ".join(map(str, catalogue.steps())) or "none"
        raise WrongUse(
            f"{catalogue.store.address} has no complete checkpoint of step {step} (complete steps: {listed})"
        )
    catalogue.pin(step, pinned)
