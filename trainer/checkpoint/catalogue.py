"""The checkpoints of a run: which are complete, which are damaged, and which is the newest to resume from."""

import errno
import logging
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

from trainer.checkpoint.chunks import CHUNK_BYTES, ChunkError, ChunkReader, FileRecord
from trainer.checkpoint.manifest import COMPLETE, Manifest, OtherFormat, decode, digest
from trainer.checkpoint.progress import Progress
from trainer.checkpoint.store import Store, open_store
from trainer.command_line import WrongUse
from trainer.run.late_files import shown
from trainer.run.run_dir import RunDir
from trainer.run.writing import MEND

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
PINNED = "PINNED"
OWNER = "RUN"
"""The file of a store that says whose it is: a run's identity, and a word of the start that saves to it now."""
TEXT_BYTES = 2**28
"""What a manifest has at most: checksums of 80 TB."""
_TRIAL = "trial"
"""Begins the names of folders that are made and removed at the start."""
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO, errno.ENODATA, errno.EUCLEAN, errno.EBADMSG)
"""What a file answers that is not there, or whose disk is broken."""
_STEP_FOLDER = re.compile(r"step-(\d{8,})")


class DamagedCheckpoint(ValueError):
    """A checkpoint that was complete is so no longer."""


def is_damage(error: Exception) -> bool:
    """Whether what was met in reading a checkpoint says that it is damaged.  It does not where a file may not be read,
    or a server does not answer: then it may be whole, and a run must not leave it behind."""
    kinds = (FileNotFoundError, IsADirectoryError, NotADirectoryError)  # pyarrow leaves out the number
    return not isinstance(error, OSError) or isinstance(error, kinds) or error.errno in _GONE


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint whose manifest and file sizes are in order."""

    step: int
    manifest: Manifest
    digest: str
    """What its COMPLETE holds of the manifest."""
    base: "Checkpoint | None" = None
    """The full one that holds what this one leaves out, if it does."""


@dataclass(frozen=True, slots=True)
class Newest:
    """The checkpoint that a run goes on from, and how far it had come."""

    checkpoint: Checkpoint | None
    """The newest that is in order; None in a run that holds none at all."""
    damaged: dict[int, DamagedCheckpoint]
    """What is wrong with newer ones, by step."""
    abandoned: tuple[int, ...] = ()
    """Steps of later ones that the run goes back behind."""
    exact: bool = False
    """Whether this one was asked for, so that no other will do."""

    @property
    def digest(self) -> str | None:
        """Tells it from any other of its step; None without one."""
        return None if self.checkpoint is None else self.checkpoint.digest

    @property
    def progress(self) -> Progress:
        """How far the run had come there."""
        return Progress() if self.checkpoint is None else replace(self.checkpoint.manifest.progress)


def step_folder(step: int) -> str:
    """Name of the folder of the checkpoint taken after optimizer step `step`."""
    return f"step-{step:08d}"


def open_catalogue(run: RunDir, address: str | None) -> "Catalogue":
    """The checkpoints of a run; `address` as `checkpoint.store`.

    Raises:
        WrongUse: they are another run's.
    """
    catalogue = Catalogue(open_store(str(run.checkpoints) if address is None else address))
    if address is not None and catalogue.owner() not in (None, run.identity()):
        raise WrongUse(
            f"checkpoint.store={address} holds the checkpoints of another run than --run-dir {run.path}: give each run "
            "a store of its own; to begin with what that one has learnt, name its directory by --init-from; if that is "
            f"lost and this run is to go on in its place, remove {address}/{OWNER}"
        )
    return catalogue


class Catalogue:
    """What a store holds; reads only, but for the methods that say otherwise, which one process calls."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._bases: dict[int, int | None] = {}
        """The base of each checkpoint that was asked about; what is complete changes no longer."""
        self._claim: str | None = None
        """What OWNER holds since this start has claimed the store."""

    def owner(self) -> str | None:
        """The identity of the run whose store this is; None where none has claimed it."""
        return self.store.read(OWNER).decode().split()[0] if self.store.size(OWNER) else None

    def claim(self, identity: str) -> None:
        """From now on this start of the run saves here.  Writes."""
        self._claim = f"{identity} {secrets.token_hex(8)}"
        with self.store.writing(OWNER) as file:
            file.write(self._claim.encode())

    def check_claim(self) -> None:
        """Raises ValueError if another start, of this run or of another, has claimed the store since."""
        if self._claim is not None and self.store.size(OWNER) and self.store.read(OWNER).decode() != self._claim:
            raise ValueError(
                f"another job saves to {self.store.address} now, which began later and was given the same "
                "checkpoint.store: give each run, and each copy of one, a store of its own; this one ends"
            )

    def steps(self) -> list[int]:
        """Steps whose checkpoint holds COMPLETE, oldest first."""
        return [step for step in self._folders() if self.store.size(f"{step_folder(step)}/{COMPLETE}") is not None]

    def open(self, step: int) -> Checkpoint:
        """Read and check the manifest, and the size of every file that it names; of its base, if it has one, too.

        Raises:
            DamagedCheckpoint: they are not as they were written.
            OtherFormat: another version of this code wrote it.
            OSError: they cannot be read, though they may be whole.
        """
        folder = step_folder(step)
        try:
            content, noted = (self._read_text(f"{folder}/{name}") for name in (MANIFEST, COMPLETE))
            if digest(content).encode() != noted:
                raise ValueError(f"{MANIFEST} is not what {COMPLETE} was written for")
            manifest = decode(content)
            if manifest.progress.step != step:
                raise ValueError(f"its state is of step {manifest.progress.step}: the folder has been renamed")
            self.check_all_there(folder, manifest.files)
        except OtherFormat as other:
            raise OtherFormat(f"checkpoint {self.store.address}/{folder} {other}") from None
        except (OSError, ValueError) as error:
            raise self.unread(step, error) from None
        if manifest.base is None:
            return Checkpoint(step, manifest, noted.decode())
        try:
            base = self.open(manifest.base)
        except DamagedCheckpoint as damage:
            raise self.damaged(step, f"it needs that of step {manifest.base}, but {damage}") from None
        if base.digest != manifest.base_digest:
            raise self.damaged(step, f"it needs that of step {manifest.base}, but another one of that step is there")
        return Checkpoint(step, manifest, noted.decode(), base)

    def check_all_there(self, folder: str, files: Mapping[str, FileRecord]) -> None:
        """Raises ValueError if this process does not see all that was written into a folder."""
        for name, record in files.items():
            size = self.store.size(f"{folder}/{name}")
            if size != record.num_bytes:
                has = "is missing" if size is None else f"has {size} bytes"
                raise ValueError(f"{self.store.address}/{folder}/{name} {has}, {record.num_bytes} were written")

    def check_is(self, step: int, noted: str | None) -> None:
        """Raises ValueError if the checkpoint of `step` is not the one whose COMPLETE holds `noted`."""
        path = f"{step_folder(step)}/{COMPLETE}"
        if self.store.size(path) is None or self.store.read(path).decode() != noted:
            raise ValueError(f"{self.store.address}/{step_folder(step)}, which it needs, has gone or is another now")

    def _read_text(self, path: str) -> bytes:
        """A file that is known to be small; of another one little is read."""
        size = self.store.size(path)
        if size is not None and size > TEXT_BYTES:
            raise ValueError(f"{path} has {size} bytes, more than were ever written")
        if size is None:
            raise FileNotFoundError(errno.ENOENT, "it is no file", path)
        return self.store.read(path)

    def verify(self, step: int) -> Checkpoint:
        """As `open`, and also read every file of the checkpoint.

        Raises:
            DamagedCheckpoint: something of it is not as it was written.
            OtherFormat, OSError: as `open`.
        """
        checkpoint, folder = self.open(step), step_folder(step)
        try:
            for name, record in checkpoint.manifest.files.items():
                reader = ChunkReader(name, record, partial(self.store.read_into, f"{folder}/{name}"))
                for start in range(0, record.num_bytes, CHUNK_BYTES):
                    reader.bytes(start, min(start + CHUNK_BYTES, record.num_bytes))
        except (OSError, ChunkError) as error:
            raise self.unread(step, error) from None
        return checkpoint

    def newest(self, below: int | None = None) -> "Newest":
        """The newest that opens, of those of steps under `below`.

        Raises:
            DamagedCheckpoint: there are some, and every one is damaged.
            OtherFormat, OSError: as `open`.
        """
        damaged: dict[int, DamagedCheckpoint] = {}
        for step in reversed([step for step in self.steps() if below is None or step < below]):
            try:
                return Newest(self.open(step), damaged)
            except DamagedCheckpoint as error:
                damaged[step] = error
        if damaged:
            raise self.nothing_left(next(iter(damaged.values())))
        return Newest(None, damaged)

    def back_to(self, step: int) -> "Newest":
        """The checkpoint of `step`, as the newest.

        Raises:
            WrongUse, DamagedCheckpoint: as `choose`.
        """
        return Newest(self.choose(step), {}, tuple(other for other in self.steps() if other > step), exact=True)

    def nothing_left(self, damage: DamagedCheckpoint) -> DamagedCheckpoint:
        """What is said where no other checkpoint is left than damaged ones."""
        return DamagedCheckpoint(f"{damage}; no older checkpoint is left: train anew in another --run-dir")

    def choose(self, step: int | None) -> Checkpoint:
        """The newest complete checkpoint, or that of `step`; a damaged one is refused.

        Raises:
            WrongUse: there is no such complete checkpoint.
            DamagedCheckpoint: it is damaged.
        """
        steps = self.steps()
        if step is None and not steps:
            raise WrongUse(f"{self.store.address} holds no complete checkpoint: train the run first")
        if step is not None and step not in steps:
            listed = ", ".join(map(str, steps)) or "none"
            reason = (
                f"its checkpoint has no file {COMPLETE}, so it was never finished"
                if step_folder(step) in self.store.folders()
                else "it has no checkpoint"
            )
            raise WrongUse(f"{self.store.address} has nothing of step {step}: {reason} (complete steps: {listed})")
        return self.open(steps[-1] if step is None else step)

    def unread(self, step: int, error: Exception) -> Exception:
        """What is said of a checkpoint in whose reading `error` was met: that it is damaged, or cannot be read."""
        if is_damage(error):
            if self.store.size(f"{step_folder(step)}/{COMPLETE}") is None:
                return FileNotFoundError(
                    f"checkpoint {self.store.address}/{step_folder(step)} was removed while it was read, by the run's "
                    "training: start again with a newer one, or let one stay (python -m trainer checkpoints --pin N)"
                )
            return self.damaged(step, error)
        return OSError(
            f"checkpoint {self.store.address}/{step_folder(step)} cannot be read: {error}; give access to it, or wait "
            "until its file system or server answers, then start the same command"
        )

    def damaged(self, step: int, reason: object) -> DamagedCheckpoint:
        """What is said of a damaged checkpoint."""
        return DamagedCheckpoint(f"checkpoint {self.store.address}/{step_folder(step)} is damaged: {reason}")

    def begin_trial(self) -> str:
        """Write something small, and remove what older trials left: what keeps checkpoints from being written is found
        before work is lost.  Returns the trial's name, for `sees_trial` and `end_trial`.

        Raises:
            OSError: nothing can be written.
        """
        # A name that no machine has ever asked for: file servers' clients remember what was not there.
        name = f"{_TRIAL}-{secrets.token_hex(8)}"
        try:
            for older in self.store.folders():
                if older.startswith(_TRIAL):
                    self.store.remove(older)
            with self.store.writing(f"{name}/file") as file:
                file.write(b"checkpoints can be written here\n")
        except OSError as error:
            raise OSError(f"checkpoints cannot be written to {self.store.address}: {error}; {MEND}") from None
        return name

    def sees_trial(self, name: str) -> bool:
        """Whether this process sees what another one has written; waits for a file system that shows it late."""
        # Ranks of a new run have asked for the folder of all checkpoints, and NFS remembers what was not there.
        return shown(lambda: self.store.size(f"{name}/file") is not None)

    def end_trial(self, name: str) -> None:
        """Remove it.  Raises OSError if nothing can be removed."""
        try:
            self.store.remove(name)
        except OSError as error:
            raise OSError(f"{self.store.address}/{name} cannot be removed: {error}; {MEND}") from None

    def clear_leftovers(self) -> None:
        """Remove checkpoints that were never finished; says which cannot be removed.  Writes."""
        for step in sorted(set(self._folders()) - set(self.steps())):
            logger.warning("removing %s, which was never finished", step_folder(step))
            self._remove_folder(step_folder(step))

    def set_aside(self, step: int, word: str) -> str:
        """Rename a checkpoint so that it counts no longer but can be looked at; returns its new name.  Writes."""
        taken, name, number = set(self.store.folders()), f"{word}-{step_folder(step)}", 1
        while name in taken:
            number += 1
            name = f"{word}-{step_folder(step)}-{number}"
        self._bases.pop(step, None)
        self.store.rename(step_folder(step), name)
        return name

    def base(self, step: int) -> int | None:
        """Step of the checkpoint that this one needs; None where it needs none, is damaged or has gone."""
        if step not in self._bases:
            try:
                self._bases[step] = self.open(step).manifest.base
            except (DamagedCheckpoint, FileNotFoundError):
                self._bases[step] = None
        return self._bases[step]

    def is_pinned(self, step: int) -> bool:
        """Whether the checkpoint stays whatever retention says."""
        return self.store.size(f"{step_folder(step)}/{PINNED}") is not None

    def pin(self, step: int, pinned: bool) -> None:
        """Let a checkpoint stay, or no longer.  Writes."""
        path = f"{step_folder(step)}/{PINNED}"
        if not pinned:
            self.store.remove_file(path)
            return
        with self.store.writing(path):
            pass

    def remove(self, step: int) -> bool:
        """Delete a checkpoint; without COMPLETE first, so that a half-deleted one is never taken for whole.  Says so
        where it cannot be deleted: those that count are no worse for it.  Returns false where it counts still.
        Writes."""
        self._bases.pop(step, None)
        try:
            self.store.remove_file(f"{step_folder(step)}/{COMPLETE}")
        except OSError as error:
            logger.error("%s, which is kept no longer, cannot be removed: %s", step_folder(step), error)
            return False
        self._remove_folder(step_folder(step))
        return True

    def _remove_folder(self, folder: str) -> None:
        try:
            self.store.remove(folder)
        except OSError as error:
            logger.error("%s, which does not count, cannot be removed: %s", folder, error)

    def _folders(self) -> list[int]:
        matches = [_STEP_FOLDER.fullmatch(name) for name in self.store.folders()]
        return sorted(int(match[1]) for match in matches if match)
