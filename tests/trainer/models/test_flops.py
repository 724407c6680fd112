"""FLOP counts: allowed pairs against the dense mask, the paper's figures."""

import numpy as np
import pytest

from attention_kernels import SemiLocalMask
from attention_kernels.reference import dense_mask
from trainer.models.config import InputConfig, ModelConfig, StageConfig
from trainer.models.flops import (
    FlopCount,
    InputWidths,
    allowed_pairs,
    layer_flops,
    ranker_flops,
    retriever_flops,
)
from trainer.models.layer_config import LayerConfig
from trainer.models.retrieval_config import RetrievalConfig

PAPER = LayerConfig()
PRODUCTION = LayerConfig(variant="production")
GFLOP = 1e9


@pytest.mark.parametrize("local", [None, 0, 1, 3, 100])
@pytest.mark.parametrize("global_rows", [0, 2, 50])
@pytest.mark.parametrize("global_columns", [0, 1, 4, 50])
@pytest.mark.parametrize("newest", [None, 1, 4, 20])
def test_allowed_pairs_equal_the_sum_of_the_dense_mask(
    local: int | None, global_rows: int, global_columns: int, newest: int | None
) -> None:
    """Of all rows, or without those of the history that are not among the newest."""
    if local is None and (global_rows or global_columns):
        pytest.skip("global rows and columns need a window")
    options = {"local": local, "global_rows": global_rows, "global_columns": global_columns}
    for num_context in (0, 3):
        mask = SemiLocalMask(num_context=num_context, **options)
        lens = [(h, t) for h in (0, 1, 2, 5, 13) for t in (0, 1, 4)]
        left_out = [slice(num_context, num_context + max(h - (h if newest is None else newest), 0)) for h, _ in lens]
        masks = [dense_mask(mask, h, t) for h, t in lens]
        expected = [int(each.sum() - each[rows].sum()) for each, rows in zip(masks, left_out, strict=True)]
        history, candidates = (np.array(column) for column in zip(*lens, strict=True))
        counted = allowed_pairs(history, candidates, num_context=num_context, newest=newest, **options)
        assert counted.tolist() == expected


@pytest.mark.parametrize(
    ("tokens", "projection", "output", "output_concat", "causal", "semi_local"),
    [
        (512, 1.07, 0.27, 0.81, 0.27, 0.27),
        (1024, 2.15, 0.54, 1.61, 1.07, 0.81),
        (3072, 6.44, 1.61, 4.83, 9.67, 2.96),
        (8192, 17.2, 4.29, 12.9, 68.7, 8.34),
        (16384, 34.4, 8.59, 25.8, 274.9, 16.9),
    ],
)
def test_layer_counts_are_those_of_the_design(
    tokens: int, projection: float, output: float, output_concat: float, causal: float, semi_local: float
) -> None:
    """GFLOP of one layer at d 512, to three digits."""
    window = {"local": 256, "global_rows": 256}
    paper = layer_flops(PAPER, dim=512, num_tokens=tokens, pairs=allowed_pairs(tokens))
    production = layer_flops(PRODUCTION, dim=512, num_tokens=tokens, pairs=allowed_pairs(tokens, **window))
    assert paper.projections / GFLOP == pytest.approx(projection, rel=0.005)
    assert paper.outputs / GFLOP == pytest.approx(output, rel=0.01)
    assert production.outputs / GFLOP == pytest.approx(output_concat, rel=0.01)
    assert paper.attention / GFLOP == pytest.approx(causal, rel=0.005)
    assert production.attention / GFLOP == pytest.approx(semi_local, rel=0.02)


def test_a_further_layer_costs_what_the_papers_table_9_says() -> None:
    """Its differences between depths at 3,072 events, GFLOP at inference: 20.6 to 21.4 for a layer on everything, 2.2
    to 2.8 for one behind a truncation to 512 events.  The design explains them by the production layer on these tokens
    alone, or by the paper's with some 340 (100 behind the truncation) of context and candidates."""

    def gflop(layer: LayerConfig, tokens: int) -> float:
        return float(layer_flops(layer, dim=512, num_tokens=tokens, pairs=allowed_pairs(tokens)).forward) / GFLOP

    for full in (gflop(PRODUCTION, 3072), gflop(PAPER, 3072 + 340)):
        assert 20.6 <= full <= 21.4
    assert gflop(PRODUCTION, 512) == pytest.approx(2.15, abs=0.005)
    assert gflop(PRODUCTION, 612) == pytest.approx(2.6, abs=0.05)


def test_semi_local_pairs_are_those_of_the_design() -> None:
    pairs = [allowed_pairs(n, local=256, global_rows=256).item() / 1e6 for n in (3072, 8192, 16384)]
    assert pairs == pytest.approx([1.44, 4.07, 8.27], rel=0.005)


def test_ultra_saves_what_the_paper_says_of_merging_and_truncation() -> None:
    """Interleaving doubles the tokens; truncation pays only for the events that are left."""
    config = ModelConfig(dim=512, max_len=40000, stages=(StageConfig(num_layers=18),))
    interleaved = ModelConfig(
        dim=512, max_len=40000, stages=(StageConfig(num_layers=18),), input=InputConfig(merge="interleave")
    )
    stages = (
        StageConfig(num_layers=6, local=256, global_rows=256),
        StageConfig(num_layers=12, local=256, global_rows=256, keep_newest=1024),
    )
    ultra = ModelConfig(dim=512, max_len=40000, stages=stages)
    data = {"inputs": InputWidths(event=9, candidate=0, context=0), "num_context": 0, "num_outputs": 8}
    counts = [ranker_flops(c, 16384, 1, **data) for c in (config, interleaved, ultra)]
    assert counts[1].attention / counts[0].attention == pytest.approx(4, rel=0.001)
    assert counts[1].projections / counts[0].projections == pytest.approx(2, rel=0.001)
    assert counts[0].training.item() == 3 * counts[0].forward.item()
    assert counts[1].forward / counts[2].forward > 40


def test_a_rankers_last_layer_costs_the_rows_of_candidates() -> None:
    """V and K for all tokens, everything else for candidates."""
    layer = LayerConfig(num_heads=2, qk_dim=8, value_dim=16)
    data = {"inputs": InputWidths(event=9, candidate=0, context=0), "num_context": 2, "num_outputs": 3}

    def count(num_layers: int) -> FlopCount:
        stages = (StageConfig(num_layers=num_layers, local=4),)
        config = ModelConfig(dim=64, max_len=100, stages=stages, layer=layer)
        return ranker_flops(config, 50, 3, **data)

    pairs = float(allowed_pairs(50, 3, num_context=2, local=4))
    whole = layer_flops(layer, dim=64, num_tokens=55, pairs=pairs)
    last = FlopCount(
        projections=np.float64(2 * 64 * (55 * (32 + 16) + 3 * (32 + 16))),
        attention=np.float64(2 * 3 * (2 + 50 + 1) * 2 * (8 + 16)),
        outputs=np.float64(2 * 3 * 64 * 32),
        ends=np.float64(0),
    )
    for field in ("projections", "attention", "outputs"):
        assert getattr(count(1), field) == getattr(last, field)
        assert getattr(count(3), field) == 2 * getattr(whole, field) + getattr(last, field)


def test_a_layer_before_a_stage_that_keeps_the_newest_costs_their_rows() -> None:
    """V and K for all tokens, everything else for what is kept; pairs by the dense mask."""
    layer = LayerConfig(num_heads=2, qk_dim=8, value_dim=16)
    data = {"inputs": InputWidths(event=9, candidate=0, context=0), "num_context": 2, "num_outputs": 3}

    def count(*stages: StageConfig) -> FlopCount:
        return ranker_flops(ModelConfig(dim=64, max_len=100, stages=stages, layer=layer), 50, 3, **data)

    first = StageConfig(num_layers=2, local=4, global_rows=6)
    found = count(first, StageConfig(num_layers=1, keep_newest=10))
    rest = count(StageConfig(num_layers=1, keep_newest=10))
    mask = dense_mask(SemiLocalMask(local=4, global_rows=6, num_context=2), 50, 3)
    whole = layer_flops(layer, dim=64, num_tokens=55, pairs=float(mask.sum()))
    kept_pairs = float(mask[:2].sum() + mask[2 + 40 :].sum())
    cut = layer_flops(layer, dim=64, num_tokens=55, pairs=kept_pairs, num_rows=15)
    for field in ("projections", "attention", "outputs"):
        assert getattr(found, field) == getattr(whole, field) + getattr(cut, field) + getattr(rest, field)


def test_counts_take_arrays_of_lengths() -> None:
    config = ModelConfig(dim=64, max_len=100, stages=(StageConfig(num_layers=2),))
    data = {"inputs": InputWidths(event=36, candidate=32, context=64), "num_context": 2, "num_outputs": 3}
    both = ranker_flops(config, np.array([5, 9]), np.array([1, 4]), **data).forward
    single = [ranker_flops(config, h, t, **data).forward.item() for h, t in ((5, 1), (9, 4))]
    assert both.tolist() == single


def test_a_retriever_scores_all_events_but_the_last_against_negatives_and_the_next_item() -> None:
    config = ModelConfig(
        dim=64, max_len=100, stages=(StageConfig(num_layers=2),), retrieval=RetrievalConfig(num_negatives=31)
    )
    layer = layer_flops(config.layer, dim=64, num_tokens=10, pairs=55).forward
    assert retriever_flops(config, 10, embedding_dim=64, num_items=100).forward == 2 * layer + 9 * 2 * 64 * 32
    assert retriever_flops(config, 0, embedding_dim=64, num_items=100).forward == 0
    mapped = retriever_flops(config, 10, embedding_dim=16, num_items=100).forward
    assert mapped == 2 * layer + 9 * 2 * 16 * 32 + 10 * 2 * (2 * 16 * 64)
