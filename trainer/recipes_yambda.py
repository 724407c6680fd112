"""Recipes on Yambda, whose histories are the longest that are public, and their stand-ins.  Standard library only."""

from dataclasses import replace

from embeddings.config import SparseOptimizerConfig
from pipelines.config import DataConfig, StochasticLengthConfig
from trainer.config import (
    CheckpointConfig,
    DenseOptimizerConfig,
    EvaluationConfig,
    ScheduleConfig,
    TableSettings,
    TrainConfig,
)
from trainer.labels.config import LabelConfig
from trainer.models.config import InputConfig, ModelConfig, StageConfig
from trainer.models.heads.config import MlpConfig
from trainer.models.layer_config import LayerConfig


def yambda_ultra() -> TrainConfig:
    """Rank Yambda's actions with ULTRA-HSTU: 18 semi-local layers on histories of 16,384 events; for GPUs.

    Prepare the data first: python -m pipelines.prepare yambda --source DIR --out data/yambda --samples-per-user 1
    --max-history 65536

    The paper does not print windows, truncation, batch and rates: these are of public code, or inferred from its
    FLOPs.  The batch is for about eight GPUs.
    """
    window = {"local": 256, "global_rows": 256}
    return TrainConfig(
        name="yambda_ultra",
        data=DataConfig(
            path="data/yambda",
            global_batch_size=256,
            max_history_len=16384,
            max_candidates=100,
            window_samples=4096,
            stochastic_length=StochasticLengthConfig(mode="load_balanced", selection="age_weighted", gamma=1.3),
        ),
        model=ModelConfig(
            dim=512,
            # History, candidates and up to 28 context features.
            max_len=16512,
            layer=LayerConfig(num_heads=4, qk_dim=128, value_dim=128),
            stages=(StageConfig(num_layers=6, **window), StageConfig(num_layers=12, keep_newest=1024, **window)),
        ),
        embedding_dim=512,
        sparse_optimizer=SparseOptimizerConfig(learning_rate=1e-3),
        optimizer=DenseOptimizerConfig(learning_rate=1e-3, betas=(0.95, 0.999)),
        schedule=ScheduleConfig(warmup_steps=1000),
    )


def yambda_ultra_authors() -> TrainConfig:
    """Rank Yambda's actions with the ULTRA-HSTU that its authors published: 8 semi-local layers, 12 full; for GPUs.

    Prepare the data first: python -m pipelines.prepare yambda --source DIR --out data/yambda_authors --candidates 512
    --eval-candidates 512 --samples-per-user 1 --max-history 16354

    Layers, windows, lengths and scale are those of hstu_ultra in meta-recsys/generative-recommenders (2026), which has
    no trainer: lengths are not cut at random, and batch and rates are yambda_ultra's.  There, candidates do not take
    part in the first 8 layers; here they do and see all events, as they do everywhere in this project.
    """
    base = yambda_ultra()
    return replace(
        base,
        name="yambda_ultra_authors",
        data=replace(
            base.data,
            path="data/yambda_authors",
            max_history_len=16354,
            max_candidates=512,
            stochastic_length=StochasticLengthConfig(),
        ),
        model=replace(
            base.model,
            max_len=16896,
            layer=LayerConfig(variant="production", num_heads=4, qk_dim=128, value_dim=128, scale=1 / 128),
            stages=(
                StageConfig(num_layers=8, local=256, global_rows=256),
                StageConfig(num_layers=12, keep_newest=1024),
            ),
        ),
    )


_DLRM_V4_ROWS = {
    **{"item": 9_390_624, "artist": 1_293_395, "album": 3_367_692, "user": 1_000_001},
    **{"user_x_artist": 100_000_000, "user_x_album": 40_000_000, "user_x_hour": 24_000_000},
    **{"item_x_hour": 40_000_000, "artist_x_hour": 32_000_000, "user_x_organic": 2_000_000},
    "user_x_artist_x_hour": 40_000_000,
}
"""Rows of the reference's tables, on which their initial values depend."""
_DLRM_V4_BATCH = 8192


def dlrm_v4() -> TrainConfig:
    """Rank Yambda's listenings as MLPerf Training v6.1's recommender (DLRMv4): day by day to an AUC of .75; for GPUs.

    Prepare the data first: python -m pipelines.prepare yambda --source DIR --out data/dlrm_v4 --histories gathered
    --max-history 4086 --min-history 4086

    Sampler, shapes, tables, optimizers, warm-up, batch and evaluations are those of mlcommons/training,
    recommendation_v4, at a global batch of 8,192; at k times as much the reference takes k times the rates.  Every 280
    steps (2,293,760 samples) from step 7,000 on the last day is scored, and .75 ends the run.  What differs: the layers
    of the input and the head are this project's, the head reads the tower's output alone, the AUC is of all of the
    day's samples at once, and docs/models.md says the rest.  No baseline is counted: it would gather 2.3 billion
    histories.
    """
    columns = ("item_id", "item.artist", "item.album")
    return TrainConfig(
        name="dlrm_v4",
        data=DataConfig(
            path="data/dlrm_v4",
            global_batch_size=_DLRM_V4_BATCH,
            max_history_len=4086,
            order="stored",
            window_samples=_DLRM_V4_BATCH,
            # Neighbours stay on a rank: they share users, and a rank gathers few units that it does not need.
            shuffle_run=64,
        ),
        model=ModelConfig(
            dim=512,
            # Three thirds of 1,362 events, 8 context features, a candidate.
            max_len=4096,
            layer=LayerConfig(variant="production", num_heads=4, qk_dim=128, value_dim=128, dropout=0.1),
            stages=(StageConfig(num_layers=3),),
            input=InputConfig(event=columns, candidate=columns, num_positions=8192, num_time_buckets=2048, dropout=0.2),
            labels=(LabelConfig(name="listen_plus", weight=0.2),),
            head=MlpConfig(hidden=(512,)),
        ),
        embedding_dim=512,
        tables={name: TableSettings(initial_bound=rows**-0.5) for name, rows in _DLRM_V4_ROWS.items()},
        sparse_optimizer=SparseOptimizerConfig(learning_rate=1e-6),
        optimizer=DenseOptimizerConfig(learning_rate=1e-6, betas=(0.95, 0.999)),
        schedule=ScheduleConfig(warmup_steps=24_000),
        evaluation=EvaluationConfig(every_steps=280, first_step=7000, target="auc/listen_plus>=0.75", baseline=False),
    )


def kuairand_days() -> TrainConfig:
    """Rank KuaiRand's long views day by day, each scored before it is trained on: dlrm_v4 in small; for a CPU.

    Prepare the data first: python -m pipelines.prepare kuairand --source KUAIRAND_PURE --out data/kuairand_days
    --histories gathered --max-history 120

    Sampler, columns, windows and tables are of dlrm_v4's kind, widths are smaller, rates higher.
    """
    columns = ("item_id", "item.author", "item.music")
    small = dlrm_v4()
    return replace(
        small,
        name="kuairand_days",
        data=replace(
            small.data,
            path="data/kuairand_days",
            global_batch_size=256,
            eval_batch_size=1024,
            max_history_len=120,
            window_samples=4096,
            reader_threads=0,
        ),
        model=replace(
            small.model,
            dim=64,
            max_len=129,
            layer=LayerConfig(variant="production", num_heads=2, qk_dim=32, value_dim=32, dropout=0.1),
            input=InputConfig(event=columns, candidate=columns, num_positions=128, num_time_buckets=64, dropout=0.2),
            labels=(LabelConfig(name="long_view"),),
            head=MlpConfig(hidden=(64,)),
        ),
        embedding_dim=32,
        tables={},
        sparse_optimizer=SparseOptimizerConfig(learning_rate=0.05),
        optimizer=DenseOptimizerConfig(learning_rate=1e-3, betas=(0.95, 0.999)),
        schedule=ScheduleConfig(warmup_steps=50),
        checkpoint=CheckpointConfig(every_steps=None),
        evaluation=EvaluationConfig(progressive=True),
    )
