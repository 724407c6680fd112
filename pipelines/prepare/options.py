"""Choices of a preparation that hold for every data set."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleOptions:
    """How a user's events become samples.

    Events before the split time are cut, from the newest back, into `samples_per_user` groups of `candidates`; each
    group with the events before it is a training sample.  The earliest `eval_candidates` events from the split time on
    are cut likewise into evaluation samples.  Events of one second or one request stay in one group, even if it then
    has more than `candidates`.
    """

    histories: str = "stored"
    """stored: each sample has its own.  gathered: the log is stored once, and each labelled event is a sample, whose
    history is gathered as it is read: of each of three kinds of events the newest third of max_history.  Windows of a
    day are then parts to train on one after another, the last one to evaluate on.  For kuairand and yambda."""
    candidates: int = 16
    """Labelled events of a sample at most, except where one second or one request has more."""
    samples_per_user: int | None = None
    """Training samples of a user at most, the newest; 0 for as many as the events allow.  If not given, 0, so that
    every label is learnt from; with leave_last, for retrieval, which learns from every event of a history, 1."""
    eval_candidates: int = 100
    """Labelled events of a user at most that are for evaluation, the earliest after the split time."""
    eval_groups: bool = True
    """Evaluate groups of candidates as training does, each with all events before it, as serving would.  Otherwise a
    user has one evaluation sample, whose history ends where evaluation begins."""
    counts: bool = True
    """Give each candidate the counts of what the log knew before it: how often its item, its user and both together
    stood there, and with which actions (columns item_seen, item_taken_0, ...).  A ranker starts from their rates; data
    that is cut by --leave-last is for retrieval and has none."""
    count_user_columns: bool = True
    """Count the user together with each other column of one id of the candidate (surface) or its item (brand), too."""
    count_columns: str = ""
    """Columns of one id, of candidates (surface) or of items (item.brand), separated by commas, whose values are
    counted over all users, too, as items are: where actions are rare, or rates of such values change.  Each takes a
    sort of the log."""
    max_history: int = 1024
    """Newest events of a history that are kept.  Each sample stores its own: with all samples of a user, what is stored
    grows with this number times the number of events over --candidates."""
    min_history: int = 1
    """Samples with fewer events of history are left out."""
    min_candidates: int = 1
    """Training samples with fewer labelled events are left out."""
    split_time: int | None = None
    """Unix seconds at which evaluation begins; if not given, train_fraction decides."""
    train_fraction: float = 0.85
    """Share of the events that lie before the split time, to the hour; unused if split_time is given."""
    leave_last: int | None = None
    """Newest events of each user that are for evaluation, whatever their time, in place of a split in time: the next
    item by its place in the order, as published tables have it.  Other users' later events then stand in the training
    split, and a history may end in its candidates' own second, so such data is for retrieval."""
    drop_last: int = 0
    """Newest events of each user that are left out before all else, with --leave-last: what is chosen on the event
    before them has not seen them."""
    train_history: int | None = None
    """Newest events of a training sample's history that are kept, if fewer than max_history: with --samples-per-user 0
    and many candidates, each event of a long history is trained on once."""
    max_users: int | None = None
    """Users kept, in the order of a hash of their ids; all if not given."""
    min_count: int = 1
    """Events before the split time that an item needs for an id of its own; rarer ones, and those that are new after
    it, share id 0, which then is trained as they would be."""
    order: str = "users"
    """Order of the stored training samples: users (pseudo-random by user) or time (by their first candidate)."""
    row_group_events: int = 131_072
    """Events of a row group of the written files, about: the unit in which a reader reads."""
    file_events: int = 33_554_432
    """Events of a file, about."""
    memory_gib: float = 4.0
    """Memory of the engine; what does not fit is spilled next to the output."""
    threads: int | None = None
    """Threads of the engine; all cores if not given."""

    def __post_init__(self) -> None:
        minima = {"candidates": 1, "eval_candidates": 1, "max_history": 1, "min_history": 0, "drop_last": 0}
        minima |= {"min_candidates": 1, "min_count": 1, "row_group_events": 1, "file_events": 1}
        minima |= {
            name: 1
            for name in ("leave_last", "train_history", "max_users", "threads")
            if getattr(self, name) is not None
        }
        if self.samples_per_user is not None:
            minima["samples_per_user"] = 0
        for name, minimum in minima.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {minimum}, got {getattr(self, name)}")
        if self.leave_last is not None and self.split_time is not None:
            raise ValueError(f"--split-time={self.split_time} has no effect with --leave-last: give one of them")
        if self.leave_last is not None and self.min_count > 1:
            raise ValueError(
                f"--min-count={self.min_count} would make the shared id of rare items the next item to find: with "
                "--leave-last, leave it out"
            )
        if self.drop_last and self.leave_last is None:
            raise ValueError(f"--drop-last={self.drop_last} has no effect without --leave-last: give both")
        if self.count_columns and not self.counted:
            raise ValueError(
                f"--count-columns={self.count_columns} has no effect with --no-counts or --leave-last: give one of them"
            )
        if not 0 < self.train_fraction < 1:
            raise ValueError(f"--train-fraction must lie between 0 and 1, got {self.train_fraction}")
        if self.memory_gib < 0.25:
            raise ValueError(f"--memory-gib must be at least 0.25, got {self.memory_gib}")
        if self.histories not in ("stored", "gathered"):
            raise ValueError(f"--histories must be stored or gathered, got {self.histories}")
        if self.order not in ("users", "time"):
            raise ValueError(f"--order must be users or time, got {self.order}")

    @property
    def counted(self) -> bool:
        """Whether candidates carry counts."""
        return self.counts and self.leave_last is None

    @property
    def counted_columns(self) -> tuple[str, ...]:
        """The columns whose values are counted over all users."""
        return tuple(part.strip() for part in self.count_columns.split(",") if part.strip())

    @property
    def newest_samples(self) -> int:
        """Training samples of a user at most; 0 for no such limit."""
        if self.samples_per_user is not None:
            return self.samples_per_user
        return 0 if self.leave_last is None else 1
