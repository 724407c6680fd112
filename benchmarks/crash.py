"""Does a run that is struck again and again end like one that never was?

Run: python -m benchmarks.crash [--kills 100] [--minutes 60] [--ranks 2] [--seed 0] [--json FILE]

A small model trains on `--ranks` processes.  Its job is struck at a random moment, by a random kind of fault, and
started again, until it has ended; then the next run begins, until `--kills` faults have struck or `--minutes` are over.
Every run must write the losses and evaluations of one that nothing happened to, bit for bit and each once, and its
checkpoints must verify.  Results are added to those that the file holds, after every run.
"""

import argparse
import datetime
import json
import math
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

STEPS = 24
LIMIT_S = 300.0
SETTINGS = (
    f"max_steps={STEPS}",
    "checkpoint.every_steps=3",
    "checkpoint.keep=3",
    "evaluation.every_steps=8",
    "log_every=1",
    "watch.least_s=5",
    "data.global_batch_size=12",
    "data.eval_batch_size=1024",
    "data.max_history_len=24",
    "model.max_len=160",
    "model.dim=16",
    "embedding_dim=8",
    "model.layer.qk_dim=8",
    "model.layer.value_dim=8",
)


def start(run_dir: Path, data: str, ranks: int) -> subprocess.Popen[bytes]:
    """The job, its output in RUN_DIR.out."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "trainer", "train", "kuairand_sample", "--run-dir", str(run_dir)]
    with Path(f"{run_dir}.out").open("ab") as output:
        return subprocess.Popen(
            [*command, "--set", f"data.path={data}", *SETTINGS],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def family(pid: int) -> list[int]:
    """A process and all below it, parents first."""
    found = [pid]
    for parent in found:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            found += [int(child) for child in _text(children).split()]
    return found


def _text(path: Path) -> str:
    """What a file of /proc holds; nothing, if its process has ended."""
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _send(number: signal.Signals, choose: Callable[[str], bool]) -> Callable[[int, random.Random], bool]:
    """A fault: a signal to one process of the job whose command line is chosen; false if there is none."""

    def strike(job: int, chance: random.Random) -> bool:
        commands = {pid: _text(Path(f"/proc/{pid}/cmdline")).replace("\0", " ") for pid in family(job)}
        chosen = [pid for pid, command in commands.items() if choose(command)]
        if not chosen:
            return False
        try:
            os.kill(chance.choice(chosen), number)
        except ProcessLookupError:
            return False
        return True

    return strike


def _kill_all(job: int, chance: random.Random) -> bool:
    """The machine is gone: every process at once."""
    for pid in family(job):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return True


def _is_rank(command: str) -> bool:
    return " -m trainer train " in command and "distributed.run" not in command


FAULTS: dict[str, Callable[[int, random.Random], bool]] = {
    "kill a rank": _send(signal.SIGKILL, _is_rank),
    "stop a rank": _send(signal.SIGSTOP, _is_rank),
    "kill the agent": _send(signal.SIGKILL, lambda command: "distributed.run" in command),
    "terminate the agent": _send(signal.SIGTERM, lambda command: "distributed.run" in command),
    "kill a reader": _send(signal.SIGKILL, lambda command: "forkserver" in command),
    "kill a writer": _send(signal.SIGKILL, lambda command: "checkpoint.writer" in command),
    "kill everything": _kill_all,
}
DAMAGES = ("flip a bit", "cut a file", "delete a file")
"""To the newest checkpoint while nothing runs, where there is another one."""


def damage(run_dir: Path, kind: str, chance: random.Random) -> bool:
    """Harm a file of the newest complete checkpoint; false if it is the only one."""
    complete = sorted(file.parent for file in run_dir.glob("checkpoints/step-*/COMPLETE"))
    if len(complete) < 2:
        return False
    file = chance.choice(sorted(path for path in complete[-1].iterdir() if path.name != "COMPLETE"))
    content = bytearray(file.read_bytes())
    if kind == "delete a file":
        file.unlink()
    elif kind == "cut a file":
        file.write_bytes(content[: chance.randrange(len(content))])
    else:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
    return True


@dataclass
class Tally:
    """What one kind of fault did."""

    strikes: int = 0
    ended_s: list[float] = field(default_factory=list)
    """From the strike to the end of every process of the job."""

    def add(self, other: "Tally") -> None:
        """The strikes of both."""
        self.strikes += other.strikes
        self.ended_s += other.ended_s


def wait(process: subprocess.Popen[bytes], pids: list[int]) -> None:
    """Until the job and every process that was part of it have ended.

    Raises:
        TimeoutError: they have not.
    """
    deadline = time.monotonic() + LIMIT_S
    while process.poll() is None or any(_runs(pid) for pid in pids):
        if time.monotonic() > deadline:
            raise TimeoutError(f"of the job's processes {pids} some run after {LIMIT_S:.0f} s")
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    status = _text(Path(f"/proc/{pid}/status"))
    return bool(status) and "State:\tZ" not in status and "State:\tX" not in status


def num_joined(run_dir: Path) -> int:
    """Ranks that have joined a job of this run, all its starts together."""
    return sum(_text(log).count("collectives by") for log in run_dir.glob("logs/rank-*.log"))


def trial(run_dir: Path, data: str, ranks: int, chance: random.Random, budget: int, whole_s: float) -> dict[str, Tally]:
    """A run struck up to `budget` times, then left to its end; what struck it."""
    tallies: dict[str, Tally] = {}
    struck = 0
    while True:
        before = num_joined(run_dir)
        process = start(run_dir, data, ranks)
        moment = time.monotonic() + chance.uniform(0.0, 0.9 * whole_s)
        while process.poll() is None and (struck >= budget or time.monotonic() < moment):
            time.sleep(0.02)
        # Ranks that wait for one which never joined the job give up after ten minutes, too long for here.
        kinds = [kind for kind in FAULTS if kind != "stop a rank" or num_joined(run_dir) == before + ranks]
        pids = family(process.pid)
        began = time.monotonic()
        # The first of a random order that finds what it strikes.
        candidates = chance.sample(kinds, len(kinds)) if process.poll() is None else []
        if kind := next((kind for kind in candidates if FAULTS[kind](process.pid, chance)), None):
            struck += 1
            tally = tallies.setdefault(kind, Tally())
            tally.strikes += 1
            wait(process, pids)
            tally.ended_s.append(time.monotonic() - began)
        else:
            wait(process, pids)
        if process.returncode == 0:
            return tallies
        if struck == 0:
            raise AssertionError(f"{run_dir} failed though nothing struck it; see {run_dir}.out")
        kind = chance.choice(DAMAGES)
        if struck < budget and chance.random() < 0.3 and damage(run_dir, kind, chance):
            struck += 1
            tallies.setdefault(kind, Tally()).strikes += 1


def result(run_dir: Path) -> dict[str, Any]:
    """What must be the same, whatever happened on the way."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        "losses": [(line["step"], line["samples"], line["loss"]) for line in lines],
        "evaluations": [json.loads(line) for line in (run_dir / "eval.jsonl").read_text().splitlines()],
    }


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
        """Of all kinds."""
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
            "ended_s_by_kind": {
                kind: {"median": round(median(tally.ended_s), 1), "max": round(max(tally.ended_s), 1)}
                for kind, tally in sorted(self.faults.items())
                if tally.ended_s
            },
        }


def campaign(
    folder: Path, data: str, *, kills: int, ranks: int, seed: int, limit_s: float = math.inf
) -> Iterator[Outcome]:
    """Strike runs `kills` times in all, or until no run may begin any longer; the outcome of each.

    Raises:
        AssertionError: a run did not end like the one that nothing happened to.
    """
    chance = random.Random(seed)
    began = time.monotonic()
    process = start(folder / "whole", data, ranks)
    wait(process, family(process.pid))
    assert process.returncode == 0, f"the run without faults failed; see {folder / 'whole'}.out"
    whole_s, expected = time.monotonic() - began, result(folder / "whole")
    struck = number = 0
    while struck < kills and time.monotonic() - began < limit_s:
        number += 1
        run_dir, run_began = folder / f"run-{number}", time.monotonic()
        faults = trial(run_dir, data, ranks, chance, min(4, kills - struck), whole_s)
        run_s = time.monotonic() - run_began
        assert result(run_dir) == expected, f"{run_dir} ended otherwise than {folder / 'whole'}"
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
    parser = argparse.ArgumentParser(description="Strike a training run until it ends.")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", default="data/kuairand_sample")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/crash.json"))
    arguments = parser.parse_args()
    outcomes = read_outcomes(arguments.json)
    with tempfile.TemporaryDirectory(prefix="longview-crash-") as folder:
        for outcome in campaign(
            Path(folder),
            arguments.data,
            kills=arguments.kills,
            ranks=arguments.ranks,
            seed=arguments.seed,
            limit_s=60 * arguments.minutes,
        ):
            outcomes.setdefault(str(arguments.ranks), Outcome()).add(outcome)
            write_outcomes(arguments.json, outcomes)
    total = Outcome()
    for outcome in outcomes.values():
        total.add(outcome)
    print(json.dumps(total.summary(), indent=1))


if __name__ == "__main__":
    main()
