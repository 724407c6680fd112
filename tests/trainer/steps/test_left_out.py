"""A batch that spoils the model is named, and gone past as the policy says: as if it had not been there."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.training import read_checkpoint, read_lines, run_training
from trainer.steps.left_out import NotFinite, check_finite
from trainer.steps.optim import GradientNorms

STEPS, SPOILT = 7, 5
"""The batch of the second spoils the model, on the last rank only."""
SETTINGS = (f"max_steps={STEPS}", "checkpoint.every_steps=3", "log_every=2")


def run(folder: Path, ranks: int, *overrides: str, spoilt: str = f"{SPOILT} loss") -> tuple[int, str]:
    """(exit status, output) of a job whose batch of a step spoils the loss or the gradients."""
    return run_training(folder, ranks, *SETTINGS, *overrides, module="tests.trainer.spoilt", SPOILT=spoilt)


def test_a_run_without_a_policy_stops_and_names_the_step_and_its_samples(tmp_path: Path) -> None:
    status, output = run(tmp_path / "run", 2)
    assert status == 1
    assert f"nan is the loss of step {SPOILT}; its batch is the samples 48 to 59 of the run's order" in output
    assert not (tmp_path / "run" / "left_out.jsonl").exists()


@pytest.mark.parametrize(
    ("ranks", "policy", "what", "left_out"), [(2, "skip", "gradients", {5}), (1, "roll_back", "loss", {4, 5})]
)
def test_a_run_goes_on_as_if_the_batches_had_not_been_there(
    ranks: int, policy: str, what: str, left_out: set[int], tmp_path: Path
) -> None:
    """The steps that were left out change nothing: the state after them is the state before."""
    status, output = run(tmp_path / "run", ranks, f"nonfinite.policy={policy}", spoilt=f"{SPOILT} {what}")
    assert status == 0, output[-4000:]
    (event,) = read_lines(tmp_path / "run" / "left_out.jsonl")
    assert set(range(event["first_step"], event["step"] + 1)) == left_out and event["samples"] == [48, 59]
    assert ("parameters have such: dense/" in event["what"]) == (what == "gradients")
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [(line["step"], line["samples"]) for line in lines] == [(2, 24), (4, 48), (6, 72), (7, 84)]
    assert {line["step"] for line in lines if line["loss"] is None} == left_out & {2, 4, 6, 7}

    # A run that nothing spoils and that leaves out the same from the beginning.
    plain = tmp_path / "plain"
    run(plain, ranks, "max_steps=1", spoilt="none")
    shutil.copy(tmp_path / "run" / "left_out.jsonl", plain)
    status, output = run(plain, ranks, "checkpoint.every_steps=1", "checkpoint.keep=9", spoilt="none")
    assert status == 0, output[-4000:]
    assert {line["step"]: line["loss"] for line in read_lines(plain / "metrics.jsonl") if line["step"] > 1} == {
        line["step"]: line["loss"] for line in lines
    }
    states = {step: read_checkpoint(plain / "checkpoints" / f"step-{step:08d}") for step in range(1, STEPS + 1)}
    for step in range(2, STEPS + 1):
        assert _equal(states[step], states[step - 1]) == (step in left_out), step
    assert _equal(states[STEPS], read_checkpoint(tmp_path / "run" / "checkpoints" / f"step-{STEPS:08d}"))


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_run_stops_after_so_many_such_batches(tmp_path: Path) -> None:
    status, output = run(tmp_path / "run", 1, "nonfinite.policy=skip", "nonfinite.limit=1", spoilt="3 loss,5 loss")
    assert status == 1
    assert "the run has gone on past such a batch nonfinite.limit=1 times" in output
    assert [line["step"] for line in read_lines(tmp_path / "run" / "left_out.jsonl")] == [3]


def test_the_first_spoilt_step_and_its_parameters_are_named() -> None:
    """A few of them; none where every gradient is finite and only their squares' sum is not."""

    def norms(*values: float) -> GradientNorms:
        each = torch.tensor(values)
        return GradientNorms(tuple("abcde"[: len(values)]), torch.cat([each.norm()[None], each]))

    steps, inf, nan = [(6, 100, 109), (7, 110, 129)], math.inf, math.nan
    check_finite([0.1, 0.2], [1.0, 2.0], steps, 2 * [norms(1.0)])
    for spoilt, named in (
        (norms(inf, 1.0, nan), r" \(2 of 3 parameters have such: c, a\)"),
        (norms(inf, inf, inf, inf, 0.0), r" \(4 of 5 parameters have such: d, c, b, \.\.\.\)"),
        (norms(1e30, 1e30), ""),
    ):
        expected = f"inf is the norm of the gradients{named} of step 7; .* samples 110 to 129"
        with pytest.raises(NotFinite, match=expected):
            check_finite([0.1, 0.2], [1.0, inf], steps, [norms(1.0), spoilt])
    with pytest.raises(NotFinite, match="nan is the loss of step 6"):
        check_finite([nan, 0.2], [1.0, inf], steps, 2 * [norms(inf)])
