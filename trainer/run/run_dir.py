"""A run directory: where a run keeps its configuration, metrics, checkpoints and logs.

Opening an existing directory checks that it belongs to the same run before anything in it is touched.
"""

import errno
import hashlib
import json
import os
import secrets
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from embeddings.records import from_dict
from pipelines.storage.locks import locks
from trainer.command_line import WrongUse
from trainer.config import TrainConfig
from trainer.run.writing import sync, whole_name, write_json, written
from trainer.typed_values import ABSENT, differences, to_dict

VOCABULARIES = "vocabularies"
"""Key of `config.json` that is no part of the configuration: what the ids mean in the data that the run learnt from."""
DIGEST = "digest"
"""Another such key: tells whether all the rest is as it was written."""
IDENTITY = "run"
"""Another such key: a word that no other run has, by which a store tells whose checkpoints it holds."""
NUMBERS = "data.numbers"
"""Key among these: what is known of the data's columns of numbers, as JSON."""

# What may differ between a run's saved configuration and the one that resumes it: how long, how often, where and how
# fast the work is done.  Everything else decides which numbers the run computes, so changing it asks for another run.
CHANGEABLE = (
    "max_steps",
    "log_every",
    "data.path",
    "data.mix_paths",
    "data.num_epochs",
    "data.max_samples",
    "data.eval_batch_size",
    "data.balance",
    "data.attention_cost",
    "data.reader_threads",
    "data.prefetch_batches",
    "checkpoint.every_steps",
    "checkpoint.keep",
    "checkpoint.deltas",
    "checkpoint.asynchronous",
    "checkpoint.strict",
    "evaluation.",
    "nonfinite.",
    "watch.",
    "placement.",
    "schedule.",
    "overlap",
    "recorded",
    "context_parallel",
)


@dataclass(frozen=True, slots=True)
class RunDir:
    """Paths of a run directory, and the few files that are plain JSON."""

    path: Path

    @property
    def config_file(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.json"

    @property
    def plan_file(self) -> Path:
        """The sharding plan in force."""
        return self.path / "plan.json"

    @property
    def environment_file(self) -> Path:
        """What the newest start ran on: devices, versions and data."""
        return self.path / "environment.json"

    @property
    def profile(self) -> Path:
        """Traces of steps, one a rank."""
        return self.path / "profile"

    @property
    def metrics_file(self) -> Path:
        """One object a logged step."""
        return self.path / "metrics.jsonl"

    @property
    def eval_file(self) -> Path:
        """One object an evaluation."""
        return self.path / "eval.jsonl"

    @property
    def progressive_file(self) -> Path:
        """One object a part of the data that was scored before it was trained on."""
        return self.path / "progressive.jsonl"

    @property
    def left_out_file(self) -> Path:
        """One object an event: steps whose batches are left out."""
        return self.path / "left_out.jsonl"

    def eval_file_of(self, data_path: str) -> Path:
        """One object an evaluation on other data than the run's own, named by its whole path; of a long one the end,
        for names of files are bounded."""
        return self.path / f"eval_{quote(data_path, safe='')[-200:]}.jsonl"

    def evaluations(self) -> list[Path]:
        """All files of what was measured at steps: on the run's data, on parts to come, and on other data."""
        return [self.eval_file, self.progressive_file, *sorted(self.path.glob("eval_*.jsonl"))]

    @property
    def tensorboard(self) -> Path:
        """The numbers of metrics.jsonl and eval.jsonl, for TensorBoard."""
        return self.path / "tensorboard"

    def log_file(self, rank: int) -> Path:
        """The log of one rank."""
        return self.path / "logs" / f"rank-{rank}.log"

    @property
    def lock_file(self) -> Path:
        """Locked by the process that trains the run, for as long as it lives."""
        return self.path / "lock"

    @property
    def saving_file(self) -> Path:
        """How long the last save took; is there once a checkpoint has been complete."""
        return self.path / "saving.json"

    @property
    def back_file(self) -> Path:
        """To which step which job has gone back."""
        return self.path / "back.json"

    @property
    def checkpoints(self) -> Path:
        """The folder of all checkpoints."""
        return self.path / "checkpoints"

    def make(self) -> None:
        """Make the directory, where it does not exist.

        Raises:
            WrongUse: it cannot be made, or this user may not write in it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not os.access(self.path, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise WrongUse(
                f"--run-dir {self.path} cannot be written ({error.strerror}): name one in which you may write"
            ) from None

    def flush(self) -> None:
        """Let what the first rank has written here so far reach the disk."""
        texts = (self.metrics_file, self.eval_file, self.progressive_file, self.left_out_file)
        for file in (self.config_file, self.plan_file, *texts):
            if file.is_file():
                sync(file)
        sync(self.path)
        sync(self.path.parent)

    def saved_config(self) -> dict[str, Any] | None:
        """The configuration that the directory was made with; None where it holds no run yet."""
        if not self.config_file.is_file():
            return None
        values = read_object(self.config_file, "restore it or use another --run-dir")
        if not isinstance(values.get("checkpoint", {}), dict):
            raise WrongUse(f"{self.config_file} does not hold a configuration: restore it or use another --run-dir")
        noted = values.pop(DIGEST, None)
        if noted is not None and noted != _digest(values):
            raise WrongUse(
                f"{self.config_file} is not what the run wrote, which decides what its weights mean: undo the change, "
                "or take the file of a run with the same settings (they are changed on the command line, with --set)"
            )
        for key in (VOCABULARIES, IDENTITY):
            values.pop(key, None)
        return values

    def config_of_run(self) -> dict[str, Any]:
        """The configuration of the run that the directory must hold.  Raises WrongUse if it holds none."""
        saved = self.saved_config()
        if saved is None:
            what = "holds no config.json" if self.path.is_dir() else "is no directory"
            raise WrongUse(f"{self.path} {what}: name a run directory that `train` made")
        return saved

    def trained_config(self) -> TrainConfig:
        """`config_of_run` as a `TrainConfig`.  Raises WrongUse for what `config_that_trained` refuses."""
        saved = self.config_of_run()
        try:
            return config_that_trained(saved)
        except ValueError as error:
            raise WrongUse(
                f"{self.config_file} is not of this version of the code: {error}; use the version that trained the run"
            ) from None

    def saved_vocabularies(self) -> dict[str, str]:
        """What the run was trained with (`trainer.resolve.Resolved.meanings`); after `saved_config`."""
        if not self.config_file.is_file():
            return {}
        known: dict[str, str] = json.loads(self.config_file.read_text()).get(VOCABULARIES, {})
        return known

    def identity(self) -> str | None:
        """What the run is known by, wherever its directory lies; None until it has begun.  After `saved_config`."""
        if not self.config_file.is_file():
            return None
        identity: str | None = json.loads(self.config_file.read_text()).get(IDENTITY)
        return identity

    def save_config(self, config: dict[str, Any], known: dict[str, str]) -> None:
        """Write the configuration, and what its data mean beside it."""
        values = {**config, VOCABULARIES: known, IDENTITY: self.identity() or secrets.token_hex(8)}
        write_json(self.config_file, {**values, DIGEST: _digest(values)})

    def save_environment(self, devices: str, versions: Mapping[str, str], data: str) -> None:
        """Write what this start runs on, and digests of the data that it trains on."""
        write_json(self.environment_file, {"devices": devices, "versions": dict(versions), "data": data})

    def saved_environment(self) -> dict[str, Any]:
        """What the newest start ran on; empty where it is not known."""
        if not self.environment_file.is_file():
            return {}
        return read_object(self.environment_file, "remove it, the next start writes it anew")

    def check_same_run(self, config: dict[str, Any]) -> None:
        """Refuse a directory that another run made; reads only.

        Raises:
            WrongUse: the directory is no run's, is another recipe's, or a key that decides the numbers has changed.
        """
        if self.path.exists() and not self.path.is_dir():
            raise WrongUse(f"--run-dir {self.path} is a file: name a directory")
        saved = self.saved_config()
        if saved is None:
            # A job may make these before it has written config.json, or end while it writes it.
            early: tuple[str, ...] = ("attempts.jsonl", "jobs", "lock", "logs", self.config_file.name)
            if not any(self.checkpoints.glob("*/COMPLETE")):
                early += (self.checkpoints.name,)
            if self.path.is_dir() and any(whole_name(entry.name) not in early for entry in self.path.iterdir()):
                raise WrongUse(
                    f"--run-dir {self.path} exists and holds no config.json, so it is no run: use another one"
                )
            return
        if saved.get("name") != config["name"]:
            raise WrongUse(
                f"--run-dir {self.path} holds a run of recipe {saved.get('name')!r}, not {config['name']!r}: "
                "use another one"
            )
        for key, old, new in differences(saved, config):
            if _may_change(key):
                continue
            if ABSENT in (old, new) and not _is_of_this_version(saved):
                raise WrongUse(
                    f"--run-dir {self.path} was trained by another version of this code: only "
                    f"{'this one' if old is ABSENT else 'that one'} knows {key}; go on with the version that "
                    "trained it or use another run directory"
                )
            before = f"without {key}" if old is ABSENT else f"with {key}={json.dumps(old)}"
            now = "without it" if new is ABSENT else json.dumps(new)
            raise WrongUse(
                f"--run-dir {self.path} was trained {before}, now {now}: "
                f"resume with the old value or use another run directory"
            )


def _is_of_this_version(saved: dict[str, Any]) -> bool:
    """Whether a run's configuration has the keys that this code gives it, besides those that users name (tables)."""
    try:
        known = to_dict(from_dict(TrainConfig, saved))
    except ValueError:
        return False
    return all(ABSENT not in (old, new) for _, old, new in differences(saved, known))


def config_that_trained(saved: dict[str, Any]) -> TrainConfig:
    """The configuration that a run has saved.

    Raises:
        ValueError: it lacks a key that decides what the weights mean, where this code's default need not be what they
            were trained with, or has one that nobody knows.
    """
    config = from_dict(TrainConfig, saved)
    for key, old, _ in differences(saved, to_dict(config)):
        if old is ABSENT and not _may_change(key):
            raise ValueError(f"key {key!r} is missing")
    return config


def _may_change(key: str) -> bool:
    """Whether a dotted key, or each of the keys in a group of this name, is `CHANGEABLE`."""
    return f"{key}.".startswith(CHANGEABLE)


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def check_nothing_lost(run: RunDir, store: str) -> None:
    """Refuse to begin anew where there is no complete checkpoint in `store` any longer.

    Raises:
        WrongUse: the run has saved some.
    """
    if run.saving_file.is_file():
        raise WrongUse(
            f"--run-dir {run.path} has saved checkpoints, but {store} holds no complete one: mount it or bring them "
            "back, or train anew in another --run-dir"
        )


def read_object(file: Path, mend: str) -> dict[str, Any]:
    """The object that a file of JSON holds.  Raises WrongUse, which says how to `mend` it, if it holds none."""
    try:
        values = json.loads(file.read_text())
    except ValueError as error:
        raise WrongUse(f"{file} is not valid JSON ({error}): {mend}") from None
    if not isinstance(values, dict):
        raise WrongUse(f"{file} holds something other than an object: {mend}")
    return values


@contextmanager
def locked(run: RunDir) -> Iterator[None]:
    """Keep other trainers out of the run directory; the system ends the lock with this process, however it ends.

    Raises:
        WrongUse: another process is training the run, or the directory cannot be written.
    """
    run.make()
    with written(run.lock_file):
        lock = run.lock_file.open("a+b", buffering=0)
    with lock as file:
        if not locks(file):
            file.seek(0)
            raise WrongUse(
                f"--run-dir {run.path} is being trained by another job ({file.read().decode().strip()}): cancel that "
                f"one or use another directory; if it is gone for certain, remove {run.lock_file}"
            )
        with written(run.lock_file):
            file.truncate(0)
            file.write(_this_process().encode())
        yield


def check_still_ours(run: RunDir) -> None:
    """Where no lock keeps a second job out, or somebody has removed it, the first one leaves the run to the second.
    Where the directory has been moved, nothing is saved under its old name, where no start would look for it.

    Raises:
        ValueError: the lock names another process, or the directory is the run's no longer.
    """
    if not run.config_file.is_file():
        raise ValueError(
            f"{run.path} holds this run no longer: it was moved or removed while it was trained; start the same "
            "command with --run-dir where it lies now, and it goes on from its newest checkpoint"
        )
    if not run.lock_file.is_file():
        return
    holder = run.lock_file.read_text(errors="replace")
    if holder not in ("", _this_process()):
        raise ValueError(
            f"{run.lock_file} names another job ({holder.strip()}), which trains this run now: a run directory takes "
            "one at a time, so this one ends"
        )


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}, {_own_word()}\n"


@cache
def _own_word() -> str:
    """Tells this process from one in another container, which may have the same number and name: of a pod that is lost
    behind a broken network, and of the one that takes its place."""
    return secrets.token_hex(4)
