"""What a job's ranks and nodes wrote, each job's own part, and which rank failed first.

All jobs of a run append to the same file a rank; a job's part is what was written from its first start on and before
the next one's.
"""

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from launch import attempts, records
from launch.records import JobRecord
from trainer.run.run_dir import RunDir

_STAMPED = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)[,.]?(\d{3})?(?: |$)")
_ERROR = re.compile(r"\S+ \S+ (?:ERROR|CRITICAL) ")
_ENDED = re.compile(r"\S+ \S+ rank (\d+) failed: it (.*)")
_SAID = re.compile(
    r"(?:error: |srun: error: |slurmstepd(?:-\S+)?: error: |[\w.]*Error: ).*|"
    r".*: (?:not found|No such file or directory|Permission denied)$"
)

# What a rank says whose partner has gone: a consequence, whatever its time.
_CONSEQUENCE = re.compile(
    r"connection (?:closed|reset|refused)|closed by peer|broken pipe|remote process exited|socket timeout|"
    r"ncclremoteerror|failed to recv|ended with status|ended by SIGTERM|another rank ended",
    flags=re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Span:
    """A job's own time, in Unix seconds."""

    since: float
    until: float = float("inf")


@dataclass(frozen=True, slots=True)
class Fault:
    """What a rank, or a node before it had ranks, failed of."""

    time: float
    """Unix seconds; of a line without a time, its file's last change."""
    rank: int | None
    """None: a node's own words."""
    words: str
    """The line itself."""

    def __str__(self) -> str:
        return self.words if self.rank is None else f"rank {self.rank}: {self.words}"

    @property
    def order(self) -> tuple[bool, bool, float]:
        """The first by this is the cause: consequences come last, and words without a rank after those with one."""
        return bool(_CONSEQUENCE.search(self.words)), self.rank is None, self.time


def span_of(record: JobRecord) -> Span:
    """From the job's first start to the next one's in the same run directory; empty if it has not started."""
    begun = _first_start(record)
    if begun is None:
        return Span(float("inf"))
    others = [_first_start(job) or 0.0 for job in records.of_run(Path(record.run_dir))]
    # Log lines may be stamped to the second.
    return Span(int(begun), min((moment for moment in others if moment > begun), default=float("inf")))


def _first_start(job: JobRecord) -> float | None:
    """When the job first started, by the clock of its first node, which may differ from this machine's."""
    told = Path(job.job_dir, attempts.STARTED)
    return _moment(told.read_text()) if told.is_file() else None


def last_start(record: JobRecord) -> Span:
    """The part of the job's time that came after its last start but one had ended."""
    span = span_of(record)
    ends = [_moment(attempt.time) for attempt in attempts.read(Path(record.run_dir), Path(record.job_dir).name)]
    return Span(max(span.since, ends[-2] or 0.0) if len(ends) > 1 else span.since, span.until)


def ranks(run: RunDir) -> list[int]:
    """The ranks that have a log, from 0."""
    found = [re.fullmatch(r"rank-(\d+)\.log", path.name) for path in (run.path / "logs").glob("rank-*.log")]
    return sorted(int(match[1]) for match in found if match)


def rank_lines(run: RunDir, rank: int, span: Span) -> Iterator[str]:
    """A rank's lines of a job, each with its newline.

    Raises:
        ValueError: the rank has no log, or wrote nothing in that time.
    """
    path = run.log_file(rank)
    if not path.is_file():
        known = ranks(run)
        has = f"there are those of ranks {known[0]} to {known[-1]}" if known else "no rank has written one yet"
        raise ValueError(f"{path} does not exist: {has}")
    inside = False
    with path.open(errors="replace") as file:
        for line in file:
            moment = _moment(line)
            # A line without a time goes on with what the one before it said.
            inside = inside if moment is None else span.since <= moment < span.until
            if inside:
                yield line


def first_failure(record: JobRecord, span: Span) -> Fault | None:
    """Why the job failed: the earliest fault that is no consequence of another; None if none is told."""
    run, job_dir = RunDir(Path(record.run_dir)), Path(record.job_dir)
    faults = [fault for rank in ranks(run) for fault in _rank_faults(run, rank, span)]
    outputs = [*job_dir.glob("node-*.out"), *job_dir.glob("job.out")] if record.job_dir else []
    faults += [fault for path in outputs for fault in _node_faults(path, span)]
    return min(faults, key=lambda fault: fault.order, default=None)


def _rank_faults(run: RunDir, rank: int, span: Span) -> Iterator[Fault]:
    """A logged error with the last line of its traceback, which is what it says."""
    moment, words = None, ""
    for line in rank_lines(run, rank, span):
        stamped = _moment(line)
        if stamped is None:
            words = line.strip() or words
            continue
        if moment is not None:
            yield Fault(moment, rank, words)
        moment = stamped if _ERROR.match(line) else None
        words = line.rstrip()
    if moment is not None:
        yield Fault(moment, rank, words)


def _node_faults(path: Path, span: Span) -> Iterator[Fault]:
    changed = path.stat().st_mtime
    moment = None
    for line in path.read_text(errors="replace").splitlines():
        moment = _moment(line) or moment
        ended = _ENDED.match(line)
        if moment is not None and not span.since <= moment < span.until:
            continue
        if ended:
            yield Fault(moment or changed, int(ended[1]), line)
        elif _SAID.match(line):
            yield Fault(moment or changed, None, line)


def _moment(line: str) -> float | None:
    """Unix seconds of a line that begins with a local date and time."""
    stamped = _STAMPED.match(line)
    if not stamped:
        return None
    try:
        # Every line of every rank comes by here; strptime takes ten times as long.
        return datetime.fromisoformat(stamped[1]).timestamp() + int(stamped[2] or 0) / 1000
    except ValueError:
        return None


def follow(paths: Callable[[], list[Path]], ended: Callable[[], bool], show: Callable[[Path, str], None]) -> None:
    """Show what is added to files, and to files that come into being, until the job has ended."""
    read: dict[Path, int] = {path: path.stat().st_size for path in paths()}
    while True:
        # Asked before the last look, so that nothing written before the end is missed.
        over = ended()
        for path in paths():
            with path.open("rb") as file:
                file.seek(read.get(path, 0))
                text = file.read()
            # The beginning of a line waits until the rest is written.
            whole = text if over else text[: text.rfind(b"\n") + 1]
            read[path] = read.get(path, 0) + len(whole)
            if whole:
                show(path, whole.decode(errors="replace"))
        if over:
            return
        time.sleep(1.0)


def follow_text(read: Callable[[], str], ended: Callable[[], bool], show: Callable[[str], None]) -> None:
    """Show a text that grows, until the job has ended."""
    shown = 0
    while True:
        # Asked before the last read, so that nothing is missed that was written before the end.
        over = ended()
        text = read()
        show(text[shown:])
        shown = len(text)
        if over:
            return
        time.sleep(1.0)
