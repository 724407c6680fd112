"""A rank that hangs ends the job, is named, and every rank leaves its stacks."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.multiprocessing import ProcessExitedException

from tests.support.distributed import run_ranks
from tests.support.training import read_checkpoint, read_lines, start_training
from tests.trainer.health import watched
from trainer.config import WatchConfig
from trainer.health.watchdog import FIRST, Beat, Clock, describe_culprits


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_phase_may_take_ten_times_the_longest_but_first_ones_as_long_as_compilers_do(now: list[float]) -> None:
    clock = Clock(WatchConfig(least_s=20.0, first_s=300.0))
    for step in range(FIRST):
        assert clock.limit("step") == 300.0
        now[0] += 1.0 if step else 60.0
        clock.stepped(step + 1)
    # The start, which the first step ends, is no step.
    assert (clock.step, clock.limit("step")) == (FIRST, 600.0)
    assert clock.limit("evaluation") == 300.0


def test_a_phase_inside_a_step_is_no_time_of_the_step(now: list[float]) -> None:
    clock = Clock(WatchConfig(least_s=20.0, first_s=300.0))
    clock.stepped(1)
    clock.enter("evaluation")
    now[0] += 50.0
    assert (clock.phase, clock.seconds) == ("evaluation", 50.0)
    clock.leave()
    assert (clock.phase, clock.seconds) == ("step", 0.0)


def test_time_in_which_nothing_of_the_process_ran_is_no_time_of_a_phase(now: list[float]) -> None:
    clock = Clock(WatchConfig(least_s=20.0, first_s=300.0))
    now[0] += 1000.0
    clock.forgive(999.0)
    assert (clock.phase, clock.seconds) == ("start", 1.0)


def test_limits_that_end_every_run_are_refused() -> None:
    with pytest.raises(ValueError, match=r"watch\.least_s must be above 1"):
        WatchConfig(least_s=1.0)
    with pytest.raises(ValueError, match=r"watch\.least_s must be above 1 and at most watch\.first_s, got 50"):
        WatchConfig(least_s=50.0, first_s=40.0)


COLLECTIVE = [("trainer/loop.py", 3, "run"), ("lib/torch/distributed/c10d.py", 9, "all_reduce")]
BUSY = [("trainer/loop.py", 3, "run"), ("trainer/steps/feed.py", 7, "next")]


def _beat(step: int = 4, phase: str = "step") -> Beat:
    return Beat(count=9, phase=phase, step=step, seconds=1.0, host="h", pid=1)


@pytest.mark.parametrize(
    ("stacks", "beats", "said"),
    [
        ((COLLECTIVE, None, COLLECTIVE), (_beat(), _beat(), _beat()), "rank 1 does not answer"),
        ((None, None, COLLECTIVE), (_beat(), None, _beat()), "ranks 0, 1 do not answer"),
        (
            (COLLECTIVE, BUSY),
            (_beat(), _beat()),
            "wait for rank 1 in phase step after step 4 at trainer/steps/feed.py:7 (next)",
        ),
        ((BUSY, BUSY), (_beat(4), _beat(3)), "wait for rank 1 in phase step after step 3"),
        ((COLLECTIVE, COLLECTIVE), (_beat(phase="data"), _beat()), "wait for rank 0 in phase data after step 4"),
        ((COLLECTIVE, COLLECTIVE), (_beat(), _beat()), "no rank differs from the others, which are at lib/torch"),
    ],
)
def test_the_rank_that_differs_is_named(
    stacks: tuple[list[tuple[str, int, str]] | None, ...], beats: tuple[Beat | None, ...], said: str
) -> None:
    assert said in describe_culprits(dict(enumerate(stacks)), dict(enumerate(beats)))


@pytest.mark.parametrize("where", ["step", "data", "evaluation"])
def test_a_hung_rank_ends_all_and_is_named_with_the_place(where: str, tmp_path: Path) -> None:
    with pytest.raises(ProcessExitedException, match="terminated with exit code"):
        run_ranks(3, watched.hang, str(tmp_path), where)
    logs = [Path(tmp_path, f"rank-{rank}.log").read_text() for rank in range(3)]
    said = f"the others wait for rank 1 in phase {where} after step {FIRST + 1} at "
    # The one that the launcher ended first may not have come to say it.
    assert any(said in log for log in logs), logs
    assert "never_comes" in logs[1] and "thread MainThread" in logs[1]


def _wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)


def _ranks_of(process: subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


ENDLESS = ("data.num_epochs=1000", "checkpoint.every_steps=4")


def test_a_stopped_rank_ends_the_job(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start_training(run, 2, *ENDLESS, "watch.least_s=3")
    _wait_until(lambda: len(read_lines(run / "metrics.jsonl")) > 4, process)
    os.kill(_ranks_of(process)[1], signal.SIGSTOP)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "rank 1 does not answer, stopped or gone" in output, output[-3000:]
    assert "via SIGKILL" not in output, "the judge ended it"


def test_ranks_whose_agent_dies_save_and_end(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start_training(run, 2, *ENDLESS)
    _wait_until(lambda: len(read_lines(run / "metrics.jsonl")) > 4, process)
    process.kill()
    # Its pipe is the ranks' too, so this waits for their end.
    output, _ = process.communicate(timeout=120)
    last = read_lines(run / "metrics.jsonl")[-1]["step"]
    assert f"stopped after step {last}, which is saved" in output, output[-3000:]
    assert read_checkpoint(run / "checkpoints" / f"step-{last:08d}")


def test_ranks_whose_agent_dies_before_they_have_met_end_at_once(tmp_path: Path) -> None:
    """Each would wait for the others, whom nobody starts, for ten minutes."""
    process = start_training(tmp_path / "run", 2, *ENDLESS)
    _wait_until(lambda: len(_ranks_of(process)) == 2, process)
    process.kill()
    process.communicate(timeout=120)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("lost_by", "said"),
    [
        (f"{signal.SIGKILL:d}", ""),
        (f"{signal.SIGSTOP:d}", "rank 1 has been stopped by a signal (SIGSTOP)"),
        ("an import that hangs", "rank 1 has done nothing for 30 s in its imports"),
    ],
)
def test_a_rank_that_is_lost_before_the_ranks_have_met_ends_the_others_at_once(
    lost_by: str, said: str, tmp_path: Path
) -> None:
    """Torchrun asks them to end, waits for 30 s, and then forces them."""
    module = "tests.trainer.health.lost_in_imports"
    process = start_training(tmp_path / "run", 2, *ENDLESS, module=module, environment={"LOST_BY": lost_by})
    output, _ = process.communicate(timeout=120)
    assert "via SIGKILL" not in output and said in output, output[-3000:]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
