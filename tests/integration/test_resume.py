"""A run that stops and goes on equals one that never stopped: on the same ranks bit for bit, on others to rounding."""

import json
import os
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.support.small_data import small_dataset
from tests.support.training import (
    TIMEOUT_S,
    kill_job,
    losses,
    read_checkpoint,
    read_lines,
    run_trainer,
    run_training,
    start_training,
    train,
)
from trainer.run.run_dir import RunDir, locked
from trainer.run.writing import MEND

STEPS = 8
# Float32 sums in another order; after 8 steps the largest difference measured is 1.2e-7, in losses and in tensors.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps on two ranks, with a checkpoint after each fourth."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    train(run, 2, f"max_steps={STEPS}", "checkpoint.every_steps=4")
    return run


@pytest.fixture(scope="module")
def stopped_at_four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first four of these steps."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    train(run, 2, "max_steps=4", "checkpoint.every_steps=4")
    return run


def test_killed_run_writes_the_same_losses_bit_for_bit(uninterrupted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = (f"max_steps={STEPS}", "checkpoint.every_steps=4")
    process = start_training(run, 2, *settings)
    deadline = time.monotonic() + 120
    # Past the checkpoint of step 4, before the end.
    while max(losses(read_lines(run / "metrics.jsonl")), default=0) < 5 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    kill_job(process)
    assert not (run / "eval.jsonl").exists(), "the run ended before it could be killed"
    assert losses(train(run, 2, *settings)) == losses(read_lines(uninterrupted / "metrics.jsonl"))
    expected, actual = (read_checkpoint(path / "checkpoints" / f"step-{STEPS:08d}") for path in (uninterrupted, run))
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert torch.equal(value, actual[name]), name


def test_a_run_goes_on_from_a_delta_bit_for_bit(uninterrupted: Path, tmp_path: Path) -> None:
    """Saved after every step, three of four times the touched rows alone."""
    run = tmp_path / "run"
    settings = ("checkpoint.every_steps=1", "checkpoint.deltas=3")
    train(run, 2, "max_steps=4", *settings)
    newest = json.loads((run / "checkpoints" / "step-00000004" / "manifest.json").read_text())
    assert newest["base"] == 1 and (run / "checkpoints" / "step-00000001" / "COMPLETE").exists()
    assert losses(train(run, 2, f"max_steps={STEPS}", *settings)) == losses(read_lines(uninterrupted / "metrics.jsonl"))
    expected, actual = (read_checkpoint(path / "checkpoints" / f"step-{STEPS:08d}") for path in (uninterrupted, run))
    for name, value in expected.items():
        assert torch.equal(value, actual[name]), name


@pytest.mark.parametrize("ranks", [1, 3])
def test_run_goes_on_with_another_number_of_ranks(
    uninterrupted: Path, stopped_at_four: Path, ranks: int, tmp_path: Path
) -> None:
    """Every table and optimizer state is carried over, and the same samples follow."""
    run = tmp_path / "run"
    shutil.copytree(stopped_at_four, run)
    resumed = train(run, ranks, f"max_steps={STEPS}", "checkpoint.every_steps=4")
    reference = read_lines(uninterrupted / "metrics.jsonl")
    assert [line["step"] for line in resumed] == list(range(1, STEPS + 1))
    assert [line["samples"] for line in resumed] == [line["samples"] for line in reference]
    assert {line["step"]: line["world_size"] for line in resumed} == {
        s: 2 if s <= 4 else ranks for s in range(1, STEPS + 1)
    }
    assert losses(resumed) == pytest.approx(losses(reference), rel=1e-5)
    expected, actual = (read_checkpoint(path / "checkpoints" / f"step-{STEPS:08d}") for path in (uninterrupted, run))
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=lambda text, name=name: f"{name}: {text}", **TOLERANCE)


def test_three_ranks_go_on_bit_for_bit(tmp_path: Path) -> None:
    """Sums of three depend on their order; the sums of two do not.  The switch compares the steps taken twice."""
    settings = ("checkpoint.every_steps=4", "deterministic=true", "evaluation.every_steps=4")
    whole = losses(train(tmp_path / "whole", 3, f"max_steps={STEPS}", *settings))
    run = tmp_path / "run"
    assert losses(train(run, 3, "max_steps=6", *settings)) == {step: whole[step] for step in range(1, 7)}
    # As after a kill past step 5, in the evaluation of step 4.
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    lines = (run / "eval.jsonl").read_text().splitlines(keepends=True)
    assert [json.loads(line)["step"] for line in lines] == [4, 6]
    (run / "eval.jsonl").unlink()
    assert losses(train(run, 3, f"max_steps={STEPS}", *settings)) == whole
    assert (run / "eval.jsonl").read_text() == (tmp_path / "whole" / "eval.jsonl").read_text()
    # A loss that was another is noticed where it is taken again.
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS:08d}")
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace(f'"loss": {whole[6]!r}', f'"loss": {whole[6] + 1e-15!r}'))
    status, output = run_training(run, 3, f"max_steps={STEPS}", *settings)
    assert status != 0 and "deterministic=true, but step 6, taken again, has the loss" in output


def test_a_model_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    """The loss, which is not logged here, is looked at before its step is saved, on all ranks."""
    run = tmp_path / "run"
    settings = ("max_steps=20", "checkpoint.every_steps=1", "log_every=20", "optimizer.learning_rate=1e38")
    status, output = run_training(run, 2, *settings)
    assert status != 0
    found = re.search(r"error: nan is the loss of step (\d+); its batch is the samples", output)
    assert found, output[-3000:]
    newest = max((run / "checkpoints").glob("step-*"))
    assert newest.name == f"step-{int(found[1]) - 1:08d}"
    tensors = read_checkpoint(newest)
    assert all(value.isfinite().all() for value in tensors.values())


def test_all_that_a_run_wrote_has_reached_the_disk_when_it_is_done(tmp_path: Path) -> None:
    """The last line of the metrics and the last evaluation too, which come after the last save."""
    run = tmp_path / "run"
    settings = ("max_steps=2", "checkpoint.every_steps=2", "log_every=9")
    train(run, 1, *settings, module="tests.trainer.run.noting_syncs", NOTED=str(tmp_path / "noted"))
    noted = json.loads((tmp_path / "noted").read_text())
    assert len(read_lines(run / "metrics.jsonl")) == len(read_lines(run / "eval.jsonl")) == 1
    for file in ("metrics.jsonl", "eval.jsonl"):
        assert noted[str(run / file)] == (run / file).stat().st_size, file
    assert str(run) in noted


def test_a_missing_evaluation_split_is_found_before_the_training(tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(small_dataset(), data)
    shutil.rmtree(data / "eval")
    status, output = run_training(tmp_path / "run", 1, f"data.path={data}", "max_steps=2")
    assert status != 0 and "eval" in output.splitlines()[-1]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_damaged_newest_checkpoint_costs_the_steps_after_the_one_before_it(
    uninterrupted: Path, tmp_path: Path
) -> None:
    """The byte that changed is found as it is loaded, when reading has begun where the newest would go on."""
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    newest = run / "checkpoints" / f"step-{STEPS:08d}"
    file = newest / "rank-00001.bin"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    status, output = run_trainer("evaluate", str(run))
    assert status == 1
    assert f"error: checkpoint {newest} is damaged" in output.splitlines()[-1]
    assert losses(train(run, 2, f"max_steps={STEPS}", "checkpoint.every_steps=4")) == losses(
        read_lines(uninterrupted / "metrics.jsonl")
    )
    expected, actual = (read_checkpoint(path / "checkpoints" / newest.name) for path in (uninterrupted, run))
    assert all(torch.equal(value, actual[name]) for name, value in expected.items())
    # Back to step 4 by choice: the same steps again, and nothing of the later ones is lost; what was measured of those
    # stays no longer, for their weights may be others then.
    measured = [RunDir(run).progressive_file, RunDir(run).eval_file_of("data/today")]
    for path in measured:
        path.write_text(f'{{"step": 4}}\n{{"step": {STEPS}}}\n')
    run_trainer("checkpoints", str(run), "--pin", "4")
    settings = (f"max_steps={STEPS}", "checkpoint.every_steps=4")
    of_slurm = {"SLURM_JOB_ID": "17"}
    status, output = run_training(run, 2, *settings, options=("--from-step", "4"), **of_slurm)
    assert status == 0 and f"its checkpoint is called abandoned-{newest.name} now" in output, output[-3000:]
    assert [path.read_text() for path in measured] == ['{"step": 4}\n'] * 2
    # Preempted and queued again, its job repeats the command, and does not go back once more.
    of_slurm["SLURM_RESTART_COUNT"] = "1"
    status, output = run_training(run, 2, *settings, options=("--from-step", "4"), **of_slurm)
    assert status == 0 and f"resuming after step {STEPS} " in output, output[-3000:]
    assert losses(read_lines(run / "metrics.jsonl")) == losses(read_lines(uninterrupted / "metrics.jsonl"))
    status, output = run_trainer("checkpoints", str(run), "--verify")
    assert status == 0 and f"damaged-{newest.name} does not count" in output
    assert f"abandoned-{newest.name} does not count" in output
    assert output.count("pinned") == 1
    assert [int(line.split()[0]) for line in output.splitlines() if " verified" in line] == [4, STEPS]


def test_a_disk_without_room_costs_the_steps_after_the_newest_checkpoint(
    uninterrupted: Path, stopped_at_four: Path, tmp_path: Path
) -> None:
    """A limit on the size of files stands for the disk: logs and metrics fit, a checkpoint does not."""
    run = tmp_path / "run"
    shutil.copytree(stopped_at_four, run)
    older = {file.name: file.read_bytes() for file in (run / "checkpoints" / "step-00000004").iterdir()}
    settings = (f"max_steps={STEPS}", "checkpoint.every_steps=4")
    # The writer's memory counts as a file.
    process = start_training(run, 2, *settings, "checkpoint.asynchronous=false")
    # Of the launcher, which has started no rank yet.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    output, _ = process.communicate(timeout=120)
    said = [line.partition("error: ")[2] for line in output.splitlines() if "error: " in line]
    assert said and set(said) == {
        f"the checkpoint of step {STEPS} cannot be written: [Errno 27] File too large; {MEND}"
    }
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000004"]
    assert {file.name: file.read_bytes() for file in (run / "checkpoints" / "step-00000004").iterdir()} == older
    assert losses(train(run, 2, *settings)) == losses(read_lines(uninterrupted / "metrics.jsonl"))
    expected, actual = (read_checkpoint(path / "checkpoints" / f"step-{STEPS:08d}") for path in (uninterrupted, run))
    assert all(torch.equal(value, actual[name]) for name, value in expected.items())


def test_other_data_under_the_same_path_is_refused_and_nothing_is_written(
    stopped_at_four: Path, tmp_path: Path
) -> None:
    """The same rows, but the bits of an action mean other actions."""
    run, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(stopped_at_four, run)
    shutil.copytree(small_dataset(), data)
    description = json.loads((data / "dataset.json").read_text())
    description["actions"] = [*description["actions"][1:], description["actions"][0]]
    (data / "dataset.json").write_text(json.dumps(description))
    before = (run / "config.json").read_text()
    status, output = run_training(run, 1, f"data.path={data}", "max_steps=6", "checkpoint.every_steps=4")
    assert status != 0 and "prepare the data with these, in this order" in output.splitlines()[-1]
    assert (run / "config.json").read_text() == before


def test_a_signal_is_obeyed_where_a_step_is_saved_too(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ("data.num_epochs=1000", "log_every=1000000", "checkpoint.every_steps=2")
    process = start_training(run, 2, *settings)
    deadline = time.monotonic() + 120
    while not (run / "checkpoints").is_dir() or not list((run / "checkpoints").glob("step-*")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "stopped after step" in output, output[-3000:]


def test_a_second_job_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with locked(run):
        status, output = run_training(run.path, 2, "max_steps=2")
    assert status != 0
    assert f"error: --run-dir {run.path} is being trained by another job (process {os.getpid()} on" in output
    assert run.saved_config() is None


def test_two_ranks_train_like_one_and_show_no_warnings_of_libraries(uninterrupted: Path, tmp_path: Path) -> None:
    output, _ = start_training(tmp_path / "shown", 2, "max_steps=1").communicate(timeout=TIMEOUT_S)
    assert "checkpoint of step 1 is complete" in output and "arning" not in output
    single = train(tmp_path / "run", 1, f"max_steps={STEPS}", "checkpoint.every_steps=4")
    assert losses(single) == pytest.approx(losses(read_lines(uninterrupted / "metrics.jsonl")), rel=1e-5)
    for step in (4, STEPS):
        expected, actual = (
            read_checkpoint(path / "checkpoints" / f"step-{step:08d}") for path in (tmp_path / "run", uninterrupted)
        )
        assert expected.keys() == actual.keys()
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, msg=lambda text, name=name: f"{name}: {text}", **TOLERANCE)


def test_evaluation_and_the_overlapped_pipeline_change_no_loss(uninterrupted: Path, tmp_path: Path) -> None:
    """The plain pipeline, and one interrupted by an evaluation after every third step, train alike."""
    reference = losses(read_lines(uninterrupted / "metrics.jsonl"))
    assert losses(train(tmp_path / "plain", 2, f"max_steps={STEPS}", "overlap=plain")) == reference
    evaluated = train(tmp_path / "evaluated", 2, f"max_steps={STEPS}", "evaluation.every_steps=3")
    assert losses(evaluated) == reference
    assert [line["step"] for line in read_lines(tmp_path / "evaluated" / "eval.jsonl")] == [3, 6, 8]
