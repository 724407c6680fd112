"""Does a run that is struck again and again end like one that never was?

Run: python -m benchmarks.crash [--kills 100] [--ranks 2] [--seed 0] [--json FILE]

A small model trains on `--ranks` processes.  Its job is struck at a random moment, by a random kind of fault, and
started again, until it has ended; then the next run begins, until `--kills` faults have struck.  Every run must write
the losses and evaluations of one that nothing happened to, bit for bit and each once, and its checkpoints must verify.
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
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
        kind = chance.choice(kinds)
        pids = family(process.pid)
        began = time.monotonic()
        if process.poll() is None and FAULTS[kind](process.pid, chance):
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


def campaign(folder: Path, data: str, *, kills: int, ranks: int, seed: int) -> dict[str, Tally]:
    """Strike runs `kills` times in all.

    Raises:
        AssertionError: a run did not end like the one that nothing happened to.
    """
    chance = random.Random(seed)
    began = time.monotonic()
    process = start(folder / "whole", data, ranks)
    wait(process, family(process.pid))
    assert process.returncode == 0, f"the run without faults failed; see {folder / 'whole'}.out"
    whole_s, expected = time.monotonic() - began, result(folder / "whole")
    totals: dict[str, Tally] = {}
    number = 0
    while (left := kills - sum(tally.strikes for tally in totals.values())) > 0:
        number += 1
        run_dir = folder / f"run-{number}"
        for kind, tally in trial(run_dir, data, ranks, chance, min(4, left), whole_s).items():
            total = totals.setdefault(kind, Tally())
            total.strikes += tally.strikes
            total.ended_s += tally.ended_s
        assert result(run_dir) == expected, f"{run_dir} ended otherwise than {folder / 'whole'}"
        subprocess.run(
            [sys.executable, "-m", "trainer", "checkpoints", str(run_dir), "--verify"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        shutil.rmtree(run_dir)
        print(f"run {number}: equal after {sum(t.strikes for t in totals.values())} faults", flush=True)
    return totals


def main() -> None:
    parser = argparse.ArgumentParser(description="Strike a training run until it ends.")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", default="data/kuairand_sample")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/crash.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="longview-crash-") as folder:
        totals = campaign(
            Path(folder), arguments.data, kills=arguments.kills, ranks=arguments.ranks, seed=arguments.seed
        )
    rows = {
        kind: {
            "strikes": tally.strikes,
            "ended_s_median": round(median(tally.ended_s), 1) if tally.ended_s else None,
            "ended_s_max": round(max(tally.ended_s), 1) if tally.ended_s else None,
        }
        for kind, tally in sorted(totals.items())
    }
    for kind, row in rows.items():
        print(f"{kind:<22}{row}")
    hardware = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "ranks": arguments.ranks,
        "seed": arguments.seed,
    }
    arguments.json.write_text(json.dumps({"hardware": hardware, "equal": True, "faults": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
