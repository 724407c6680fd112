"""Does a run that is struck again and again end like one that never was?

Run: python -m benchmarks.crash [--kills 100] [--minutes 60] [--ranks 2] [--seed N] [--json FILE]

A small model trains on `--ranks` processes, started by torchrun or by our own launcher.  Its job is struck at a random
moment, by a random kind of fault, and started again, until it has ended; then the next run begins, until `--kills`
faults have struck or `--minutes` are over: then the run under way goes on to its end.  Every run must write the losses
and evaluations of one that nothing happened to, bit for bit and each once, and its checkpoints must verify.  With
`--ranks any` every start has 1 to 4 ranks, and the losses must be equal to rounding.  Results are added to those that
the file holds, after every run.
"""

import argparse
import datetime
import itertools
import json
import math
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.crash.faults import DAMAGES, DISK_FAULTS, FAULTS, UNFELT, damage, family, saves, text_of
from benchmarks.crash.small_disks import SmallDisk, small_disk
from tests.support.small_data import small_dataset

STEPS = 240
STRIKES = 12
"""To a run at most."""
LIMIT_S = 300.0
TRAINING_S = 6.0
"""A start is struck so long after its first save at the latest, if it is struck in its training."""
DISK = "2G"
"""Size of the disk that runs are on, where this process may mount one."""
SETTINGS = (
    f"max_steps={STEPS}",
    "checkpoint.every_steps=4",
    "checkpoint.keep=3",
    # A full one, a delta, one that is folded of both, and so on.
    "checkpoint.deltas=1",
    "evaluation.every_steps=24",
    "log_every=1",
    "watch.least_s=5",
    "data.num_epochs=5",
    "data.global_batch_size=12",
    "data.eval_batch_size=1024",
    "data.max_history_len=24",
    "model.max_len=160",
    "model.dim=16",
    "embedding_dim=8",
    "model.layer.qk_dim=8",
    "model.layer.value_dim=8",
    # Its random numbers follow the number of ranks.
    "model.layer.dropout=0.0",
)


ANY = "any"
"""One to four ranks, others at every start."""
LAUNCHERS = ("plainly", "torchrun", "our launcher")


@dataclass(frozen=True, slots=True)
class Job:
    """A start of a run."""

    process: "subprocess.Popen[bytes]"
    output: Path
    """What its processes say."""

    @property
    def last_words(self) -> str:
        """The end of that."""
        return self.output.read_text(errors="replace")[-3000:]


def start(run_dir: Path, data: str, ranks: str, chance: random.Random) -> Job:
    """On a number of ranks, by a launcher, with or without a process that reads: at random."""
    number = chance.randint(1, 4) if ranks == ANY else int(ranks)
    launcher = chance.choice([launcher for launcher in LAUNCHERS if number == 1 or launcher != "plainly"])
    settings = (f"data.path={data}", *SETTINGS, f"data.reader_threads={chance.choice((0, 2))}")
    recipe = ["kuairand_sample", "--run-dir", str(run_dir), "--set", *settings]
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={number}", "-m", "trainer", "train"]
    ours = ["launch", "submit", "--scheduler", "local_cwd", "--nodes", "1", "--procs-per-node", str(number)]
    module = {"plainly": ["trainer", "train"], "torchrun": torchrun, "our launcher": ours}[launcher]
    # Not on the run's disk, which may be struck.
    file = run_dir.parents[1] / f"{run_dir.name}.out"
    with file.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *module, *recipe],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    return Job(process, file)


@dataclass
class Tally:
    """What one kind of fault did."""

    strikes: int = 0
    survived: int = 0
    """The start that was struck came to the run's end, or to another strike."""
    said_s: list[float] = field(default_factory=list)
    """From the strike to the first error that a process of the job told."""
    ended_s: list[float] = field(default_factory=list)
    """From the strike to the end of every process of the job, where it did not survive."""

    def summary(self) -> dict[str, float]:
        """How often it struck, and how long the job took to tell and to end."""
        times = {"said": self.said_s, "ended": self.ended_s}
        return {
            "strikes": self.strikes,
            "survived": self.survived,
            **{f"{what}_median_s": round(median(values), 1) for what, values in times.items() if values},
            **{f"{what}_max_s": round(max(values), 1) for what, values in times.items() if values},
        }

    def add(self, other: "Tally") -> None:
        """The strikes of both."""
        self.strikes += other.strikes
        self.survived += other.survived
        self.said_s += other.said_s
        self.ended_s += other.ended_s


def wait(job: Job, pids: list[int], already_said: int = 0) -> float | None:
    """Until the job and every process that was part of it have ended; returns after how long one of them told an error,
    if one did, beyond so many bytes of output.

    Raises:
        TimeoutError: they have not.
    """
    began, told_s = time.monotonic(), None
    while job.process.poll() is None or any(_runs(pid) for pid in pids):
        seconds = time.monotonic() - began
        if seconds > LIMIT_S:
            raise TimeoutError(f"of the job's processes {pids} some run after {LIMIT_S:.0f} s: {job.last_words}")
        if told_s is None and b"error: " in job.output.read_bytes()[already_said:]:
            told_s = seconds
        time.sleep(0.02)
    return told_s


def _runs(pid: int) -> bool:
    status = text_of(Path(f"/proc/{pid}/status"))
    return bool(status) and "State:\tZ" not in status and "State:\tX" not in status


class Striker:
    """Strikes runs that are on one disk."""

    def __init__(self, data: str, ranks: str, chance: random.Random, disk: SmallDisk | None) -> None:
        self._data, self._ranks, self._chance, self._disk = data, ranks, chance, disk
        self._faults = dict(FAULTS)
        if disk is not None:
            self._faults |= {name: partial(_strike_disk, strike, disk) for name, strike in DISK_FAULTS.items()}

    def trial(self, run_dir: Path, budget: int, whole_s: float, until: float) -> dict[str, Tally]:
        """A run struck up to `budget` times, at the clock's `until` at the latest, then left to its end; what struck
        it.  One that nothing happens to takes `whole_s`."""
        tallies: dict[str, Tally] = {}
        struck = starts = 0
        while True:
            starts += 1
            assert starts <= budget + 2, f"{run_dir} does not come to its end; see {run_dir.name}.out"
            job = start(run_dir, self._data, self._ranks, self._chance)
            if time.monotonic() > until:
                budget = struck
            kinds = self._strike(job, tallies, budget - struck, whole_s)
            struck += len(kinds)
            print(f"  start {starts} of {run_dir.name}: {', '.join(kinds)}", flush=True)
            if self._disk is not None and not DISK_FAULTS.keys().isdisjoint(kinds):
                # Where the run came to its end all the same, for the next one.
                self._disk.mend()
            if job.process.returncode == 0:
                return tallies
            assert kinds, f"{run_dir} failed though nothing struck this start: {job.last_words}"
            kind = self._chance.choice(DAMAGES)
            if struck < budget and self._chance.random() < 0.5 and damage(run_dir, kind, self._chance):
                struck += 1
                tallies.setdefault(kind, Tally()).strikes += 1
                print(f"    then: {kind}", flush=True)

    def _wait_for_a_moment(self, job: Job, whole_s: float) -> None:
        """Any moment of a start, or as often one of its training: that is short, and its writers run in it alone."""
        seconds, trains = 0.9 * whole_s, self._chance.random() < 0.5
        if trains:
            seconds = TRAINING_S
            while job.process.poll() is None and not saves(job.process.pid):
                time.sleep(0.02)
        moment = time.monotonic() + self._chance.uniform(0.0, seconds)
        while job.process.poll() is None and time.monotonic() < moment:
            time.sleep(0.02)

    def _strike(self, job: Job, tallies: dict[str, Tally], budget: int, whole_s: float) -> list[str]:
        """Strike a job, if it still runs, and wait for its end; by which kinds of faults it was struck.

        One that it should not feel is followed by others.
        """
        struck: list[str] = []
        pids, said, began = [job.process.pid], 0, 0.0
        while len(struck) < budget and (not struck or struck[-1] in UNFELT):
            self._wait_for_a_moment(job, whole_s)
            if job.process.poll() is not None:
                break
            pids, said, began = pids + family(job.process.pid), job.output.stat().st_size, time.monotonic()
            # The first of a random order that finds what it strikes.
            kinds = self._chance.sample(list(self._faults), len(self._faults))
            kind = next((kind for kind in kinds if self._faults[kind](job.process.pid, self._chance)), None)
            if kind is None:
                break
            struck.append(kind)
        said_s = wait(job, pids, said)
        for kind in struck:
            tally = tallies.setdefault(kind, Tally())
            tally.strikes += 1
            if job.process.returncode == 0 or kind != struck[-1]:
                tally.survived += 1
            else:
                tally.ended_s.append(time.monotonic() - began)
                tally.said_s += [] if said_s is None else [said_s]
        return struck


def _strike_disk(strike: Callable[[SmallDisk], None], disk: SmallDisk, job: int, chance: random.Random) -> bool:
    strike(disk)
    return True


def result(run_dir: Path) -> dict[str, Any]:
    """What must be the same, whatever happened on the way."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        "losses": [(line["step"], line["samples"], line["loss"]) for line in lines],
        "evaluations": [json.loads(line) for line in (run_dir / "eval.jsonl").read_text().splitlines()],
    }


def check_equal(found: dict[str, Any], expected: dict[str, Any], ranks: str) -> None:
    """Raises AssertionError if a run ended otherwise than the one that nothing happened to."""
    if ranks != ANY:
        for what, lines in expected.items():
            pairs = itertools.zip_longest(found[what], lines)
            differs = next((f"{one} is not {other}" for one, other in pairs if one != other), None)
            assert differs is None, f"{what}: {differs}"
        return
    assert [line[:2] for line in found["losses"]] == [line[:2] for line in expected["losses"]]
    assert [line["step"] for line in found["evaluations"]] == [line["step"] for line in expected["evaluations"]]
    for line, other in zip(found["losses"], expected["losses"], strict=True):
        assert math.isclose(line[2], other[2], rel_tol=1e-5, abs_tol=1e-6), (line, other)


@dataclass
class Outcome:
    """What the runs of one campaign, or of several, came to."""

    runs: int = 0
    unstruck_s: float = 0.0
    """What as many runs took that nothing happened to."""
    struck_s: float = 0.0
    """What they took, all their starts together."""
    faults: dict[str, Tally] = field(default_factory=dict)
    """By kind."""

    @property
    def strikes(self) -> int:
        """Faults of all kinds that have struck."""
        return sum(tally.strikes for tally in self.faults.values())

    def add(self, other: "Outcome") -> None:
        """The runs of both."""
        self.runs += other.runs
        self.unstruck_s += other.unstruck_s
        self.struck_s += other.struck_s
        for kind, tally in other.faults.items():
            self.faults.setdefault(kind, Tally()).add(tally)

    def summary(self) -> dict[str, Any]:
        """What a fault costs, and how much of the time is work where one strikes every five minutes."""
        cost_s = (self.struck_s - self.unstruck_s) / max(1, self.strikes)
        return {
            "strikes": self.strikes,
            "cost_of_a_fault_s": round(cost_s, 1),
            "goodput_at_a_fault_every_five_minutes": round(1 - cost_s / 300.0, 3),
            "by_kind": {kind: tally.summary() for kind, tally in sorted(self.faults.items())},
        }


def campaign(
    folder: Path, data: str, *, kills: int, ranks: str, seed: int, limit_s: float = math.inf
) -> Iterator[Outcome]:
    """Strike runs `kills` times in all, or until `limit_s` are over; the outcome of each.

    Raises:
        AssertionError: a run did not end like the one that nothing happened to.
    """
    chance = random.Random(seed)
    began = time.monotonic()
    until = began + limit_s
    with small_disk(folder, DISK) as disk:
        runs = folder / "disk"
        runs.mkdir(exist_ok=True)
        job = start(runs / "whole", data, ranks, chance)
        wait(job, family(job.process.pid))
        assert job.process.returncode == 0, f"the run without faults failed: {job.last_words}"
        whole_s, expected = time.monotonic() - began, result(runs / "whole")
        striker = Striker(data, ranks, chance, disk)
        struck = number = 0
        while struck < kills and time.monotonic() < until:
            number += 1
            run_dir, run_began = runs / f"run-{number}", time.monotonic()
            faults = striker.trial(run_dir, min(STRIKES, kills - struck), whole_s, until)
            run_s = time.monotonic() - run_began
            check_equal(result(run_dir), expected, ranks)
            subprocess.run(
                [sys.executable, "-m", "trainer", "checkpoints", str(run_dir), "--verify"],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            shutil.rmtree(run_dir)
            outcome = Outcome(1, whole_s, run_s, faults)
            struck += outcome.strikes
            print(f"run {number}: equal after {struck} faults", flush=True)
            yield outcome


def read_outcomes(file: Path) -> dict[str, Outcome]:
    """What a file of results holds, by number of ranks."""
    if not file.is_file():
        return {}
    return {
        ranks: Outcome(
            runs=values["runs"],
            unstruck_s=values["unstruck_s"],
            struck_s=values["struck_s"],
            faults={kind: Tally(**tally) for kind, tally in values["faults"].items()},
        )
        for ranks, values in json.loads(file.read_text())["ranks"].items()
    }


def write_outcomes(file: Path, outcomes: dict[str, Outcome]) -> None:
    """All runs, and what they come to; they ended equal, or there would be nothing to write."""
    total = Outcome()
    for outcome in outcomes.values():
        total.add(outcome)
    values = {
        "date": datetime.date.today().isoformat(),
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count()},
        "all": total.summary(),
        "ranks": {ranks: asdict(outcomes[ranks]) for ranks in sorted(outcomes)},
    }
    file.write_text(json.dumps(values, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.crash", description="Strike a training run until it ends."
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--ranks", choices=["1", "2", "3", "4", ANY], default="2")
    parser.add_argument("--seed", type=int, help="default: another one for every piece of a campaign")
    parser.add_argument("--data", help="default: 800 samples of the shipped data set, evaluated in half a second")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/crash.json"))
    arguments = parser.parse_args()
    outcomes = read_outcomes(arguments.json)
    seed = sum(outcome.runs for outcome in outcomes.values()) if arguments.seed is None else arguments.seed
    # What a run that ended otherwise wrote stays, its disk in a file that can be mounted.
    folder = Path(tempfile.mkdtemp(prefix="longview-crash-"))
    for outcome in campaign(
        folder,
        arguments.data or str(small_dataset()),
        kills=arguments.kills,
        ranks=arguments.ranks,
        seed=seed,
        limit_s=60 * arguments.minutes,
    ):
        outcomes.setdefault(arguments.ranks, Outcome()).add(outcome)
        write_outcomes(arguments.json, outcomes)
    shutil.rmtree(folder)
    total = Outcome()
    for outcome in outcomes.values():
        total.add(outcome)
    print(json.dumps(total.summary(), indent=1))
