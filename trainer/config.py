"""The configuration of a run: one tree of typed values.  Standard library only, so that a laptop can check a job."""

from dataclasses import dataclass, field
from typing import Literal

from embeddings.config import PlacementConfig, RowType, SparseOptimizerConfig, UnboundedConfig
from pipelines.config import DataConfig
from trainer.models.config import ModelConfig
from trainer.target import parse_target


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseOptimizerConfig:
    """Adam on everything but the tables."""

    learning_rate: float = 1e-3
    """Base learning rate, scaled by the schedule."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """L2 penalty on the dense parameters."""
    max_gradient_norm: float | None = 1.0
    """Dense gradients are scaled down to this global norm; null switches clipping off."""

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(f"optimizer.learning_rate must be above 0, got {self.learning_rate}")
        for name in ("eps", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"optimizer.{name} must be at least 0, got {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas must lie in [0, 1), got {self.betas}")
        if self.max_gradient_norm is not None and self.max_gradient_norm <= 0:
            raise ValueError(
                f"optimizer.max_gradient_norm must be above 0, or null for no clipping, got {self.max_gradient_norm}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """The factor on all learning rates, dense and sparse, as a function of the optimizer step."""

    warmup_steps: int = 0
    """Steps of linear growth from 0 to the base rates."""
    kind: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warm-up: nothing, or a decay to `final_factor` at step `decay_steps`."""
    decay_steps: int | None = None
    """Step at which a decay ends; null for the run's end, so that its last step is the smallest.  A constant rate has
    none."""
    final_factor: float = 0.0
    """Factor at and after `decay_steps`.  With 0, a run that has further steps is refused: they would learn nothing."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"schedule.warmup_steps must be at least 0, got {self.warmup_steps}")
        if not 0 <= self.final_factor <= 1:
            raise ValueError(f"schedule.final_factor must lie in [0, 1], got {self.final_factor}")
        if self.kind == "constant" and self.decay_steps is not None:
            raise ValueError(
                f"schedule.decay_steps={self.decay_steps} has no effect with schedule.kind=constant: "
                "set kind to linear or cosine, or remove it"
            )
        if self.decay_steps is not None and self.decay_steps <= self.warmup_steps:
            raise ValueError(
                f"schedule.decay_steps must lie after the {self.warmup_steps} warm-up steps, got {self.decay_steps}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When checkpoints are written, and which are kept."""

    every_steps: int | None = 1000
    """Steps between checkpoints; null keeps only the one at the end of training."""
    keep: int = 2
    """How many of the newest complete checkpoints are kept; older ones are deleted once a newer one is complete.
    Those that `checkpoints --pin` names are always kept."""
    keep_every_steps: int | None = None
    """Checkpoints of multiples of this step are kept too; null for none."""
    keep_best: str | None = None
    """The checkpoint with the best metric of eval.jsonl is kept too: max:NAME or min:NAME, as max:auc/is_click."""
    store: str | None = None
    """Where checkpoints are stored, a place that no other run uses: a folder, or s3://, gs://, hdfs:// and a path; null
    for RUN_DIR/checkpoints."""
    deltas: int = 0
    """How many checkpoints after a full one hold, of sharded tables, only the rows that were looked up since the full
    one.  Then the next is full again; so are the first of each start, and one that would take over half the space."""
    asynchronous: bool = True
    """Write while the training continues, from a copy of the state in host memory; the copy is as large as the state,
    and half as large again with `deltas`.  false: no copy, and the training waits."""
    strict: bool = False
    """Stop if the newest checkpoint is damaged, instead of resuming from the one before it."""

    def __post_init__(self) -> None:
        if self.every_steps is not None and self.every_steps < 1:
            raise ValueError(f"checkpoint.every_steps must be at least 1, or null, got {self.every_steps}")
        if self.keep < 1:
            raise ValueError(f"checkpoint.keep must be at least 1, got {self.keep}")
        if self.deltas < 0:
            raise ValueError(f"checkpoint.deltas must be at least 0, got {self.deltas}")
        if self.keep_every_steps is not None and self.keep_every_steps < 1:
            raise ValueError(f"checkpoint.keep_every_steps must be at least 1, or null, got {self.keep_every_steps}")
        if self.keep_best is not None and not self.keep_best.startswith(("max:", "min:")):
            raise ValueError(f"checkpoint.keep_best must be max:METRIC or min:METRIC, got {self.keep_best!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """When the evaluation split is scored, besides at the end of training."""

    every_steps: int | None = None
    """Steps between evaluations during training; null for none."""
    first_step: int = 0
    """Evaluations that are due before this step are left out."""
    target: str | None = None
    """Training ends with the first evaluation that reaches this, METRIC>=VALUE or METRIC<=VALUE; null for no target."""
    baseline: bool = True
    """Show scores that know no sequences beside the model's: rates and popularity.  For these every rank reads its
    share of the training split once; false where that takes too long."""
    progressive: bool = False
    """Score each further part of the data (`prepare event_log --extend`) before it is trained on, as a model in service
    would meet it; written to progressive.jsonl."""

    def __post_init__(self) -> None:
        if self.every_steps is not None and self.every_steps < 1:
            raise ValueError(f"evaluation.every_steps must be at least 1, or null, got {self.every_steps}")
        if self.first_step < 0:
            raise ValueError(f"evaluation.first_step must be at least 0, got {self.first_step}")
        if self.every_steps is None and (self.first_step or self.target is not None):
            raise ValueError("evaluation.first_step and target have no effect without evaluation.every_steps: set it")
        if self.target is not None:
            parse_target(self.target)


@dataclass(frozen=True, kw_only=True, slots=True)
class TableSettings:
    """Settings of one table."""

    embedding_dim: int | None = None
    """Width of its rows; null for `embedding_dim` of the run."""
    dtype: RowType = "float32"
    """Type of its rows."""
    optimizer: SparseOptimizerConfig | None = None
    """An optimizer of its own; null for the run's `sparse_optimizer`."""
    initial_bound: float | None = None
    """Initial values are uniform between minus and plus this; null for 1 / sqrt(embedding_dim)."""
    unbounded: UnboundedConfig | None = None
    """Which keys have rows, for a space of unbounded ids; null for `UnboundedConfig`'s own values."""

    def __post_init__(self) -> None:
        if self.embedding_dim is not None:
            _check_width("tables: embedding_dim", self.embedding_dim)


@dataclass(frozen=True, kw_only=True, slots=True)
class NonFiniteConfig:
    """What happens where a batch makes the loss or the gradients NaN or infinite."""

    policy: Literal["stop", "skip", "roll_back"] = "stop"
    """stop: the run ends.  skip: it returns to the newest checkpoint and leaves that batch out.  roll_back: it returns
    and leaves out all batches since that checkpoint.  With the latter two, a run also saves its initial state."""
    limit: int = 3
    """How often a run may do so before it stops after all."""

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ValueError(f"nonfinite.limit must be at least 1, got {self.limit}: nonfinite.policy=stop allows none")


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchConfig:
    """When a rank counts as hung, which ends the job with the stacks of all ranks."""

    least_s: float = 30.0
    """Seconds that a rank may always take, without a sign of life or in one step, evaluation or save.  A phase may also
    take ten times as long as it ever took before."""
    first_s: float = 1800.0
    """Seconds that the start and the first five steps, evaluations and saves may each take: compilers run then."""

    def __post_init__(self) -> None:
        if not 1 < self.least_s <= self.first_s:
            raise ValueError(
                f"watch.least_s must be above 1 and at most watch.first_s, got {self.least_s} and {self.first_s}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Everything that decides a run.  A recipe is a function that returns one."""

    name: str
    """The recipe's name."""
    data: DataConfig
    """What is read, and how it becomes global batches."""
    model: ModelConfig
    """The dense model."""
    embedding_dim: int
    """Width of the rows of every table for which `tables` states no other."""
    tables: dict[str, TableSettings] = field(default_factory=dict)
    """Settings of single tables, by the name of their space in `dataset.json`."""
    sparse_optimizer: SparseOptimizerConfig = field(default_factory=SparseOptimizerConfig)
    """The tables' optimizer, fused into the backward pass."""
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    """What the sharding planner may do."""
    optimizer: DenseOptimizerConfig = field(default_factory=DenseOptimizerConfig)
    """The dense optimizer."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning rates over time."""
    frozen: tuple[str, ...] = ()
    """Parts that keep their initial values and the state of their optimizers: patterns of names in checkpoints, as
    tables/item or dense/tower.*."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When checkpoints are saved, and which are kept."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Evaluations during training."""
    nonfinite: NonFiniteConfig = field(default_factory=NonFiniteConfig)
    """Batches that spoil the model."""
    watch: WatchConfig = field(default_factory=WatchConfig)
    """When a rank counts as hung."""
    max_steps: int | None = None
    """Optimizer steps after which training ends; null trains on all of `data.num_epochs`."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl; each line costs one device synchronisation.  SIGTERM is obeyed at the next
    step that is logged, saved or evaluated."""
    seed: int = 0
    """Seeds the initial values and dropout; the order of samples has its own seed in `data`."""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of products and attention on a GPU; on a CPU everything is float32."""
    deterministic: bool = False
    """Use only operations that give the same bits every time, on a GPU too (on a CPU all do); slower.  If steps are
    repeated after a failure, their losses must then be the same, or the run stops."""
    recorded: Literal["auto", "on", "off"] = "auto"
    """Replay the dense part of steps as CUDA graphs, one for each size of batch, instead of launching kernel by kernel
    (`trainer.steps.recording`).  auto: on GPUs where that is possible; where it is not, the log says why.  on: where
    it is not possible, that is an error."""
    context_parallel: int = 1
    """Ranks that train on the same samples and compute a part of their tokens each
    (`trainer.parallel.context_parallel`): for histories too long for one GPU.  It divides the heads of every layer."""
    overlap: Literal["sparse_dist", "prefetch", "plain"] = "sparse_dist"
    """What overlaps with a step.  sparse_dist: copy and input dist of the next batches.  prefetch: also the filling of
    caches of fused_uvm_caching tables.  plain: nothing."""

    def __post_init__(self) -> None:
        _check_width("embedding_dim", self.embedding_dim)
        if self.precision == "float32" and any(layer.fp8 for layer in self.model.layers):
            raise ValueError("layer.fp8=true contradicts precision=float32: set precision=bfloat16, or fp8=false")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, or null, got {self.max_steps}")
        self._check_sharing()
        if self.model.retrieval is not None and not self.evaluation.baseline:
            raise ValueError(
                "evaluation.baseline=false is for rankers alone: leave it out, a next item is shown beside popularity"
            )
        if self.log_every < 1:
            raise ValueError(f"log_every must be at least 1, got {self.log_every}")

    def _check_sharing(self) -> None:
        shared = self.context_parallel
        if shared < 1:
            raise ValueError(f"context_parallel must be at least 1, got {shared}")
        if shared == 1:
            return
        for layer in self.model.layers:
            if layer.num_heads % shared:
                raise ValueError(
                    f"context_parallel={shared} shares the heads of a layer, which are {layer.num_heads}: choose a "
                    "divisor of it, or more heads (model.layer.num_heads)"
                )
            if not layer.is_hstu:
                raise ValueError(
                    f"context_parallel={shared} shares HSTU's layers, not layer.variant={layer.variant}: set "
                    "context_parallel=1"
                )
            if layer.relative_bias is not None:
                raise ValueError(
                    f"context_parallel={shared} shares plain layers, and layer.relative_bias is for histories of "
                    "hundreds: set context_parallel=1"
                )


def _check_width(name: str, width: int) -> None:
    if width < 4 or width % 4:
        raise ValueError(f"{name} must be a positive multiple of 4 (FBGEMM's rows), got {width}")
