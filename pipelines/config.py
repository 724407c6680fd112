"""What is read and how it becomes global batches.  Standard library only; opens no file."""

from dataclasses import dataclass, field
from typing import Literal

SYNTHETIC_PATH = "synthetic"


@dataclass(frozen=True, kw_only=True, slots=True)
class StochasticLengthConfig:
    """Shortens long histories at random during training; evaluation always sees full histories.

    A history of n events is kept whole if n <= max_history_len ** (alpha / 2), and otherwise with probability
    max_history_len ** alpha / n ** 2; else it is cut to int(max_history_len ** (alpha / 2)) events.
    """

    mode: Literal["off", "plain", "load_balanced"] = "off"
    """plain draws each sample's length on its own; load_balanced spends a fixed budget of cost a batch (LBSL)."""
    alpha: float = 1.7
    """Growth of the expected attention cost: n ** alpha instead of n ** 2; in (1, 2]."""
    selection: Literal["recent", "uniform", "age_weighted"] = "recent"
    """Which events of a cut history stay, in their order: the newest, a uniform sample, or one favouring the young."""
    gamma: float = 1.5
    """load_balanced: modelled cost of a history of n events is n ** gamma; in [1, 2]."""
    warmup_batches: int = 100
    """load_balanced: batches under the plain rule before the first budget is set to their mean cost."""
    recalibration_batches: int = 100
    """load_balanced: batches after which the budget is set anew."""
    scope: Literal["batch", "rank"] = "batch"
    """load_balanced: one budget for the global batch (the result does not depend on the number of ranks, and
    data.balance evens it out over them) or one for each rank's share (Algorithm 1 of the ULTRA-HSTU paper)."""

    def __post_init__(self) -> None:
        if not 1 < self.alpha <= 2:
            raise ValueError(f"data.stochastic_length.alpha must lie in (1, 2], got {self.alpha}; 2 keeps everything")
        if not 1 <= self.gamma <= 2:
            raise ValueError(f"data.stochastic_length.gamma must lie in [1, 2], got {self.gamma}")
        for name in ("warmup_batches", "recalibration_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.stochastic_length.{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticConfig:
    """Made-up data with planted structure, generated as it is read; used where data.path is "synthetic"."""

    num_users: int = 100_000
    """Training samples; the evaluation split has a tenth as many."""
    num_items: int = 100_000
    """Items, each with a row of the table beside that of the unknown one."""
    item_exponent: float = 1.1
    """Items are drawn with probability proportional to rank ** -item_exponent."""
    lengths: Literal["lognormal", "zipf", "constant"] = "lognormal"
    """Distribution of history lengths, always within [min_len, max_len]."""
    min_len: int = 16
    """The shortest history."""
    max_len: int = 4096
    """Longest history; every history has this length if lengths is constant."""
    num_candidates: int = 8
    """Candidates of each sample."""
    lag: int = 1024
    """Age in events, counted back from the newest, of the events that decide the candidates' labels."""
    lag_until: int | None = None
    """Each user's own lag is drawn between `lag` and this, every doubling equally likely.  The same number of events
    decides; a history shorter than its lag has none of them.  Null: all users have `lag`."""
    noise: float = 0.1
    """Probability that a label is replaced by a coin flip."""
    seed: int = 0
    """Seeds the content; the order of samples has data.seed."""

    def __post_init__(self) -> None:
        for name in ("num_users", "num_items", "min_len", "num_candidates", "lag"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.synthetic.{name} must be at least 1, got {getattr(self, name)}")
        if self.lag_until is not None and self.lag_until < self.lag:
            raise ValueError(f"data.synthetic.lag_until must be at least lag={self.lag}, got {self.lag_until}")
        if not self.min_len <= self.max_len <= 65536:
            raise ValueError(f"data.synthetic.max_len must lie in [min_len={self.min_len}, 65536], got {self.max_len}")
        if not 0 <= self.noise <= 1:
            raise ValueError(f"data.synthetic.noise must lie in [0, 1], got {self.noise}")
        if self.item_exponent < 0:
            raise ValueError(f"data.synthetic.item_exponent must be at least 0, got {self.item_exponent}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """The data of a run and its global batches; nothing here depends on the number of ranks."""

    path: str
    """Folder of a prepared data set, or its s3://, gs:// or hdfs:// address, or "synthetic"."""
    global_batch_size: int
    """Samples of a training batch, all ranks together; an upper bound if global_batch_tokens is set."""
    max_history_len: int
    """Newest events of a history that are kept, in training and evaluation."""
    global_batch_tokens: int | None = None
    """Close a training batch before its events and candidates exceed this number, though not before it has one sample;
    null for no such bound."""
    max_candidates: int | None = None
    """Earliest candidates of a sample that are kept; null for all."""
    eval_batch_size: int | None = None
    """Samples of an evaluation batch, all ranks together; null for global_batch_size."""
    num_epochs: int = 1
    """Passes over the training split.  A batch may hold samples of two passes; only the very last may be smaller."""
    max_samples: int | None = None
    """Training samples after which the stream ends; null for num_epochs passes.  Required by a mix."""
    order: Literal["shuffled", "stored"] = "shuffled"
    """shuffled: files and row groups are permuted, then samples within windows; stored: as the files have them, for
    data prepared in order of time."""
    window_samples: int = 16384
    """Samples that are shuffled together; a window holds whole row groups, and a rank keeps two of them in memory:
    about 60 bytes an event of a window."""
    shuffle_run: int = 1
    """Neighbouring rows that stay together in the shuffled order and tend to go to the same rank.  Above 1, a rank
    decodes fewer row groups for its share of a batch; meant for eight ranks and more (pipelines/prepare/README.md)."""
    seed: int = 0
    """Seeds the order of samples and every draw on them."""
    mix_paths: tuple[str, ...] = ()
    """Further prepared data sets of the same features; each sample comes from one of them or from path."""
    mix_weights: tuple[float, ...] = ()
    """Share of the samples drawn from path and from each of mix_paths, in this order; scaled to sum to one."""
    unknown_share: float = 0.0
    """Share of the ids in training samples that are replaced by the unknown id, drawn anew in every pass, so that its
    row is trained for ids that training never meets."""
    stochastic_length: StochasticLengthConfig = field(default_factory=StochasticLengthConfig)
    """Random shortening of histories in training."""
    balance: Literal["none", "equal", "bounded"] = "equal"
    """How a global batch is divided over ranks.  none: equal slices; equal: even cost, and counts that differ by at
    most one; bounded: even cost, and counts within balance_slack of the mean."""
    balance_slack: float = 0.25
    """bounded: largest count of samples on a rank, as a fraction above the mean."""
    attention_cost: float = 1.0
    """Cost of a FLOP of attention relative to one of the model's products, by which `balance` evens out; 1 counts
    FLOPs.  `python -m benchmarks.cost RECIPE` fits it to measured step times."""
    reader_threads: int = 4
    """Threads of each rank's reader process, which makes batches ahead of their use.  0: no such process; the trainer
    makes each batch when it needs it."""
    prefetch_batches: int = 4
    """Batches that a reader process makes ahead of those that it has handed over."""
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    """Content of the data set "synthetic"; an error to change for any other, where it would have no effect."""

    def __post_init__(self) -> None:
        self._check_counts()
        if not self.path:
            raise ValueError("data.path must name a prepared data set, got an empty string")
        if self.path != SYNTHETIC_PATH and self.synthetic != SyntheticConfig():
            raise ValueError(f'data.synthetic has no effect with data.path={self.path}; set data.path="synthetic"')
        if SYNTHETIC_PATH in self.mix_paths:
            raise ValueError(f'data.mix_paths must name prepared data sets; "{SYNTHETIC_PATH}" can only be data.path')
        if not 0 <= self.unknown_share < 1:
            raise ValueError(f"data.unknown_share must lie in [0, 1), got {self.unknown_share}; 0.01 suffices")
        if self.attention_cost <= 0:
            raise ValueError(f"data.attention_cost must be above 0, got {self.attention_cost}; 1 counts FLOPs")
        if self.balance == "none" and self.attention_cost != 1:
            raise ValueError(
                f"data.attention_cost={self.attention_cost} has no effect with data.balance=none; remove one of them"
            )
        if self.balance_slack < 0:
            raise ValueError(f"data.balance_slack must be at least 0, got {self.balance_slack}")
        self._check_mix()

    def _check_counts(self) -> None:
        """Bounds of the whole numbers."""
        minima = {"global_batch_size": 1, "max_history_len": 1, "num_epochs": 1, "window_samples": 1, "shuffle_run": 1}
        minima |= {"reader_threads": 0, "prefetch_batches": 1, "seed": 0}
        optional = ("global_batch_tokens", "max_candidates", "eval_batch_size", "max_samples")
        minima |= {name: 1 for name in optional if getattr(self, name) is not None}
        for name, minimum in minima.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"data.{name} must be at least {minimum}, got {getattr(self, name)}")

    def _check_mix(self) -> None:
        """A mix has one weight a source and a stated end."""
        if not self.mix_paths:
            if self.mix_weights:
                raise ValueError(f"data.mix_weights={self.mix_weights} has no effect without data.mix_paths; remove it")
            return
        if len(self.mix_weights) != 1 + len(self.mix_paths) or any(weight <= 0 for weight in self.mix_weights):
            raise ValueError(
                f"data.mix_weights must hold {1 + len(self.mix_paths)} numbers above 0, one for data.path and one for "
                f"each of data.mix_paths, got {self.mix_weights}"
            )
        if self.max_samples is None:
            raise ValueError("data.max_samples must be set with data.mix_paths: a mix repeats its sources without end")
