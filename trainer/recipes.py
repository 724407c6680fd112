"""Named runs.  A recipe is a function without arguments that returns a whole configuration; its docstring's first line
is what `python -m trainer recipes` shows.  Standard library only.
"""

from collections.abc import Callable
from dataclasses import replace

from embeddings.config import SparseOptimizerConfig
from pipelines.config import DataConfig
from trainer.config import (
    CheckpointConfig,
    DenseOptimizerConfig,
    EvaluationConfig,
    ScheduleConfig,
    TableSettings,
    TrainConfig,
)
from trainer.models.config import InputConfig, ModelConfig, StageConfig
from trainer.models.layer_config import LayerConfig
from trainer.models.relative_config import RelativeBiasConfig
from trainer.models.retrieval_config import RetrievalConfig
from trainer.recipes_yambda import dlrm_v4, kuairand_days, yambda_ultra, yambda_ultra_authors


def kuairand_sample() -> TrainConfig:
    """Rank eight actions on the shipped KuaiRand sample; trains on two CPU processes in minutes."""
    return TrainConfig(
        name="kuairand_sample",
        # A reader process would take longer to start than it saves on so few and small batches.
        data=DataConfig(
            path="data/kuairand_sample",
            global_batch_size=64,
            eval_batch_size=256,
            max_history_len=96,
            num_epochs=3,
            reader_threads=0,
        ),
        model=ModelConfig(
            dim=64,
            max_len=256,
            layer=LayerConfig(num_heads=2, qk_dim=32, value_dim=32, dropout=0.2),
            stages=(StageConfig(num_layers=2, local=32, global_rows=16),),
            input=InputConfig(num_positions=128, num_time_buckets=64),
        ),
        embedding_dim=32,
        sparse_optimizer=SparseOptimizerConfig(learning_rate=0.005),
        optimizer=DenseOptimizerConfig(learning_rate=3e-3),
        schedule=ScheduleConfig(warmup_steps=5, kind="cosine"),
        checkpoint=CheckpointConfig(every_steps=100),
    )


def own_log() -> TrainConfig:
    """Rank the actions of your own log, small or large: give data.path; starts from the rates of items and users.

    Prepare the data first: python -m pipelines.prepare event_log --source DIR --out data/own_log ...

    The settings are those that were best, or within noise of it, on all of seven kinds of logs of 10,000 to a million
    events (LOG.md).  Three passes suffice where the candidates carry counts: ids are learnt slowly, for they memorise.
    """
    return TrainConfig(
        name="own_log",
        # Batches are small: a reader process would take more of a few cores than it saves.
        data=DataConfig(
            path="data/own_log",
            global_batch_size=64,
            eval_batch_size=256,
            max_history_len=128,
            num_epochs=3,
            reader_threads=0,
            unknown_share=0.01,
        ),
        model=ModelConfig(
            dim=64,
            # History, candidates (there are more than a few where a log counts time in days) and context.
            max_len=512,
            layer=LayerConfig(num_heads=2, qk_dim=32, value_dim=32, dropout=0.2),
            stages=(StageConfig(num_layers=2),),
            input=InputConfig(num_positions=128, num_time_buckets=64),
        ),
        embedding_dim=32,
        sparse_optimizer=SparseOptimizerConfig(learning_rate=0.005),
        optimizer=DenseOptimizerConfig(learning_rate=3e-3),
        schedule=ScheduleConfig(warmup_steps=5, kind="cosine"),
    )


def kuairand_retrieval() -> TrainConfig:
    """Predict the next video of the shipped KuaiRand sample among all videos; minutes on two CPU processes."""
    return TrainConfig(
        name="kuairand_retrieval",
        data=DataConfig(path="data/kuairand_sample", global_batch_size=128, max_history_len=96, num_epochs=4),
        model=ModelConfig(
            dim=64,
            max_len=256,
            layer=LayerConfig(num_heads=2, qk_dim=32, value_dim=32, dropout=0.1),
            stages=(StageConfig(num_layers=2),),
            input=InputConfig(num_positions=256, dropout=0.2),
            retrieval=RetrievalConfig(num_negatives=512),
        ),
        embedding_dim=64,
        sparse_optimizer=SparseOptimizerConfig(learning_rate=0.03),
        optimizer=DenseOptimizerConfig(learning_rate=1e-3),
        schedule=ScheduleConfig(warmup_steps=20),
        checkpoint=CheckpointConfig(every_steps=100),
    )


def kuairand_joint() -> TrainConfig:
    """Rank actions on the shipped KuaiRand sample and predict the next video, two heads on one trunk; for CPUs."""
    ranker = kuairand_sample()
    return replace(
        ranker,
        name="kuairand_joint",
        model=replace(
            ranker.model,
            # Which rows are global depends on how many events follow: none here.
            stages=(StageConfig(num_layers=2, local=32),),
            input=replace(ranker.model.input, causal=True),
            # A lower temperature would make gradients of this loss that drown those of the labels.
            retrieval=RetrievalConfig(num_negatives=512, temperature=0.2, beside_ranking=0.05),
        ),
    )


def movielens_retrieval() -> TrainConfig:
    """Predict each user's last film of MovieLens-1M among all films, in the setting of the HSTU paper's table 4.

    Prepare the data first: python -m pipelines.prepare movielens --source DIR --out data/movielens
    --leave-last 1 --candidates 1
    """
    return TrainConfig(
        name="movielens_retrieval",
        data=DataConfig(path="data/movielens", global_batch_size=128, max_history_len=200, num_epochs=100),
        model=ModelConfig(
            dim=52,
            max_len=202,
            layer=LayerConfig(num_heads=1, qk_dim=52, value_dim=52, dropout=0.2),
            stages=(StageConfig(num_layers=2),),
            input=InputConfig(num_positions=202, dropout=0.2),
            retrieval=RetrievalConfig(num_negatives=512, exclude_seen=True),
        ),
        embedding_dim=52,
        sparse_optimizer=SparseOptimizerConfig(learning_rate=0.05),
        optimizer=DenseOptimizerConfig(learning_rate=1e-3),
        evaluation=EvaluationConfig(every_steps=470),
        checkpoint=CheckpointConfig(every_steps=470),
        # A replayed step of 3 ms waits for the host, of which the overlap would take 0.9 ms more.
        overlap="plain",
    )


_SMALL_ROWS = TableSettings(initial_bound=0.035)
"""A standard deviation of 0.02, as published: Adam turns small rows faster, and cosines know directions alone."""


def ml1m_sasrec() -> TrainConfig:
    """Next film of MovieLens-1M with SASRec, as the HSTU paper's table 4 has it, with a full softmax; Adam: for a GPU.

    Prepare the data as for ml1m_hstu, from which the layers alone differ: two Transformer blocks of one head.
    """
    base = _ml1m_hstu("ml1m_sasrec", num_layers=2, num_heads=1, head_dim=52)
    layer = LayerConfig(variant="softmax", num_heads=1, qk_dim=52, value_dim=52, norm_eps=1e-8, dropout=0.2)
    return replace(base, model=replace(base.model, layer=layer))


def ml1m_hstu() -> TrainConfig:
    """Next film of MovieLens-1M, the HSTU paper's small model (table 4), with a full softmax; Adam: for a GPU.

    Prepare the data first: python -m pipelines.prepare movielens --source DIR --out data/ml1m --ties gr
    --leave-last 1 --candidates 1

    As published but for the width (52 for 50: rows are multiples of 4), the loss (all films for 128 drawn), learnt
    scales of the norms, and the rate, which ends at 0 with the last step: so that pass counts, and none is chosen.
    """
    return _ml1m_hstu("ml1m_hstu", num_layers=2, num_heads=1, head_dim=52)


def ml1m_hstu_large() -> TrainConfig:
    """Next film of MovieLens-1M, the HSTU paper's large model: 8 layers, 2 heads; otherwise as ml1m_hstu."""
    return _ml1m_hstu("ml1m_hstu_large", num_layers=8, num_heads=2, head_dim=26)


def _ml1m_hstu(name: str, *, num_layers: int, num_heads: int, head_dim: int) -> TrainConfig:
    return TrainConfig(
        name=name,
        data=DataConfig(
            path="data/ml1m", global_batch_size=128, eval_batch_size=512, max_history_len=200, num_epochs=101
        ),
        model=ModelConfig(
            dim=52,
            max_len=211,
            layer=LayerConfig(
                num_heads=num_heads,
                qk_dim=head_dim,
                value_dim=head_dim,
                scale=1.0,
                # As published; with Xavier's, four times as large, it takes twice the passes.
                initial_std=0.02,
                dropout=0.2,
                relative_bias=RelativeBiasConfig(),
            ),
            stages=(StageConfig(num_layers=num_layers),),
            input=InputConfig(num_positions=211, dropout=0.2),
            retrieval=RetrievalConfig(num_negatives=None, exclude_seen=True),
        ),
        embedding_dim=52,
        tables={"item": _SMALL_ROWS},
        sparse_optimizer=SparseOptimizerConfig(kind="adam", learning_rate=1e-3, betas=(0.9, 0.98)),
        optimizer=DenseOptimizerConfig(learning_rate=1e-3, betas=(0.9, 0.98), max_gradient_norm=None),
        schedule=ScheduleConfig(kind="cosine"),
        checkpoint=CheckpointConfig(every_steps=None),
        # Narrow products cost little in float32.
        precision="float32",
    )


def ml1m_longview() -> TrainConfig:
    """Next film of MovieLens-1M with whole histories, ratings and times; wider than published models.  Adam: for a GPU.

    Prepare the data first: python -m pipelines.prepare movielens --source DIR --out data/ml1m_longview --ties gr
    --leave-last 1 --samples-per-user 0 --candidates 199 --train-history 1 --max-history 2400

    What is more than in ml1m_hstu: it trains on each event of histories longer than 200 (in pieces; a quarter of the
    users has one), leaves out of a ranking all that a user has rated, reads the ratings of what was seen and the time
    to the next event, and is wider.  The rate ends at 0 with the run's last step.
    """
    return TrainConfig(
        name="ml1m_longview",
        data=DataConfig(path="data/ml1m_longview", global_batch_size=128, max_history_len=2400, num_epochs=40),
        model=ModelConfig(
            dim=256,
            # A piece of a history has 199 candidates, an evaluation 199 events before its one.
            max_len=398,
            layer=LayerConfig(
                num_heads=4,
                qk_dim=64,
                value_dim=64,
                scale=1.0,
                # Outputs are small where a sequence is far below max_len.
                norm_eps=1e-8,
                # With twice the published rates and more dropout, the best of eight settings on each user's last ten
                # events but one.
                initial_std=0.02,
                dropout=0.3,
                relative_bias=RelativeBiasConfig(),
            ),
            stages=(StageConfig(num_layers=4),),
            input=InputConfig(num_positions=211, num_time_buckets=64, dropout=0.5),
            retrieval=RetrievalConfig(
                num_negatives=None, exclude_seen=True, newest_events=199, read_actions=True, read_next_time=True
            ),
        ),
        embedding_dim=256,
        tables={"item": _SMALL_ROWS},
        sparse_optimizer=SparseOptimizerConfig(kind="adam", learning_rate=2e-3, betas=(0.9, 0.98)),
        optimizer=DenseOptimizerConfig(learning_rate=2e-3, betas=(0.9, 0.98), max_gradient_norm=None),
        schedule=ScheduleConfig(warmup_steps=100, kind="cosine"),
        checkpoint=CheckpointConfig(every_steps=None),
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        kuairand_sample,
        own_log,
        kuairand_retrieval,
        kuairand_joint,
        movielens_retrieval,
        ml1m_sasrec,
        ml1m_hstu,
        ml1m_hstu_large,
        ml1m_longview,
        yambda_ultra,
        yambda_ultra_authors,
        dlrm_v4,
        kuairand_days,
    )
}
"""Every recipe by name."""


def recipe_summaries() -> dict[str, str]:
    """Each recipe's name and the first line of its docstring."""
    return {name: (recipe.__doc__ or "").strip().partition("\n")[0] for name, recipe in RECIPES.items()}


def load_recipe(name: str) -> TrainConfig:
    """The configuration of recipe `name`.

    Raises:
        ValueError: there is no such recipe.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}: known are {', '.join(sorted(RECIPES))}")
    return RECIPES[name]()
