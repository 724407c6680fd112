"""Which lines are a job's own, and which of many failures is the cause."""

import time
from pathlib import Path

import pytest

from launch import logs, records
from launch.logs import Span
from launch.records import JobRecord
from trainer.run.run_dir import RunDir

START = time.mktime(time.strptime("2026-03-01 12:00:00", "%Y-%m-%d %H:%M:%S"))


def _stamp(seconds: float) -> str:
    moment = START + seconds
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment)) + f",{int(moment % 1 * 1000):03}"


def _job(run_dir: Path, name: str, seconds: float) -> JobRecord:
    """A job that started at that time by its node's clock, and was submitted before all others by another one."""
    job_dir = run_dir / "jobs" / name
    job_dir.mkdir(parents=True)
    record = JobRecord(
        handle=f"slurm://longview/{name}",
        recipe="r",
        run_dir=str(run_dir),
        job_dir=str(job_dir),
        pid=1,
        time=START - 7 * 3600,
    )
    records.save_in(job_dir, record)
    (job_dir / "started").write_text(_stamp(seconds))
    return record


def _log(run_dir: Path, rank: int, *lines: str) -> None:
    path = RunDir(run_dir).log_file(rank)
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def test_jobs_that_share_a_run_directory_have_their_own_lines(tmp_path: Path) -> None:
    first, second = _job(tmp_path, "1", 0), _job(tmp_path, "2", 100)
    _log(
        tmp_path,
        0,
        f"{_stamp(1)} INFO a: one",
        "more of one",
        f"{_stamp(101)} ERROR a: two",
        "more of two",
    )
    waiting = _job(tmp_path, "3", 200)
    Path(waiting.job_dir, "started").unlink()
    lines = [list(logs.rank_lines(RunDir(tmp_path), 0, logs.span_of(job))) for job in (first, second, waiting)]
    assert lines == [
        [f"{_stamp(1)} INFO a: one\n", "more of one\n"],
        [f"{_stamp(101)} ERROR a: two\n", "more of two\n"],
        [],
    ]
    assert logs.first_failure(first, logs.span_of(first)) is None


def test_a_rank_without_a_log_is_named_with_those_that_have_one(tmp_path: Path) -> None:
    _log(tmp_path, 1, "x")
    with pytest.raises(ValueError, match=r"rank-3\.log does not exist: there are those of ranks 1 to 1"):
        list(logs.rank_lines(RunDir(tmp_path), 3, Span(0)))


INNOCENT = "RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:123"


@pytest.mark.parametrize(
    ("node_lines", "rank_lines", "rank", "words"),
    [
        # The rank that lost its partner reports earlier than the one that was wrong.
        ([], {0: [(1.0, INNOCENT)], 3: [(1.5, "ValueError: nonsense in part-7")]}, 3, "nonsense in part-7"),
        # A killed rank writes no log; its node says so, after others have noticed.
        (["{2} rank 5 failed: it was ended by SIGKILL (by hand)"], {0: [(1.0, INNOCENT)]}, 5, "SIGKILL"),
        # Ended with a status is what the node knows of a rank that has said more itself.
        (["{1} rank 3 failed: it ended with status 1"], {3: [(1.5, "OSError: disk full")]}, 3, "disk full"),
        (["{1} rank 2 failed: it ended with status 1"], {}, 2, "status 1"),
        (["error: node n2 has no folder /x"], {}, None, "node n2 has no folder"),
        (["slurmstepd-n1: error: StepId=1.2 exceeded memory limit"], {}, None, "exceeded memory limit"),
        (["{0} not a failure"], {0: []}, None, None),
    ],
)
def test_the_cause_is_told_from_its_consequences(
    tmp_path: Path,
    node_lines: list[str],
    rank_lines: dict[int, list[tuple[float, str]]],
    rank: int | None,
    words: str | None,
) -> None:
    job = _job(tmp_path, "1", 0)
    stamps = [_stamp(second) for second in range(3)]
    Path(job.job_dir, "node-0.out").write_text("".join(f"{line.format(*stamps)}\n" for line in node_lines))
    for number, faults in rank_lines.items():
        lines = [f"{_stamp(0)} INFO a: begins"]
        for second, last in faults:
            lines += [f"{_stamp(second)} ERROR a: rank {number} stops", "Traceback (most recent call last):", last]
        _log(tmp_path, number, *lines)
    fault = logs.first_failure(job, logs.span_of(job))
    assert (fault is None) == (words is None)
    if fault is not None and words is not None:
        assert fault.rank == rank
        assert words in fault.words


def test_following_shows_whole_lines_until_the_job_has_ended(tmp_path: Path) -> None:
    log, later = tmp_path / "a", tmp_path / "b"
    log.write_text("before\n")
    shown: list[tuple[str, str]] = []
    ends = iter([False, True])

    def ended() -> bool:
        over = next(ends)
        with log.open("a") as file:
            file.write("line\nha" if not over else "lf\n")
        if over:
            later.write_text("new file")
        return over

    def paths() -> list[Path]:
        return [path for path in (log, later) if path.exists()]

    logs.follow(paths, ended, lambda path, text: shown.append((path.name, text)))
    assert shown == [("a", "line\n"), ("a", "half\n"), ("b", "new file")]


def test_records_survive_torn_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(records, "FILE", tmp_path / "runs" / "jobs.jsonl")
    first, second = _job(tmp_path / "r", "1", 0), _job(tmp_path / "r", "2", 1)
    records.save(first)
    with records.FILE.open("a") as file:
        file.write('{"handle": "slurm://longvi')
    records.save(second)
    assert records.load() == [first, second]
    assert f"{records.FILE}, line 2 is damaged" in caplog.text
    assert records.find(second.handle) == second


def test_a_text_that_grows_is_shown_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs.time, "sleep", lambda seconds: None)
    texts, ends, shown = iter(["", "one\nha", "one\nhalf\n"]), iter([False, False, True]), []
    logs.follow_text(lambda: next(texts), lambda: next(ends), shown.append)
    assert shown == ["", "one\nha", "lf\n"]
