"""The baseline against its formula written out, and on the shipped sample."""

import json
from collections import Counter
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.baseline import (
    ITEM_PRIOR,
    USER_PRIOR,
    TrainingRates,
    baseline_scores,
    count_rates,
    item_counts,
    join_users,
)
from pipelines.config import DataConfig
from pipelines.reading.loader import build_loader, dataset_info
from tests.pipelines.made_up import ACTIONS, write_dataset

SAMPLE = Path(__file__).resolve().parents[2] / "data" / "kuairand_sample"


def logit(rate: float) -> float:
    return log(rate / (1 - rate))


def with_weights(folder: Path, rows: dict[str, list[dict[str, Any]]]) -> None:
    """Give the candidates of a data set weights, some of them 0, and take these candidates from `rows`."""
    description = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(description | {"label": {"w": "number"}, "weight": "w"}))
    draw = np.random.default_rng(5)
    for split, of_split in rows.items():
        for row in of_split:
            row["label_w"] = draw.choice([0, 1e-60, 1, 3], len(row["candidate_item_id"])).tolist()
        left = iter(of_split)
        for path in sorted((folder / split).glob("*.parquet")):
            table = pq.read_table(path)
            weights = pa.array([next(left)["label_w"] for _ in range(len(table))], pa.list_(pa.float64()))
            pq.write_table(table.append_column("label_w", weights), path, row_group_size=7)
        for row in of_split:
            for name in ("candidate_item_id", "candidate_action"):
                row[name] = [value for value, weight in zip(row[name], row["label_w"], strict=True) if weight >= 1]


@pytest.mark.parametrize("weighted", [False, True])
def test_scores_equal_the_formula_in_the_order_of_one_rank(tmp_path: Path, weighted: bool) -> None:
    rows = write_dataset(tmp_path / "data", train=60)
    if weighted:
        with_weights(tmp_path / "data", rows)
    # Some users of the evaluation split are known from training.
    config = DataConfig(path=str(tmp_path / "data"), global_batch_size=8, max_history_len=9, balance="none")
    info = dataset_info(config)
    result = baseline_scores(config, info, ["like"])
    count: Counter[tuple[str, int]] = Counter()
    positive: Counter[tuple[str, int]] = Counter()
    for row in rows["train"]:
        for item, action in zip(row["candidate_item_id"], row["candidate_action"], strict=True):
            for key in (("item", item), ("user", row["user_id"]), ("all", 0)):
                count[key] += 1
                positive[key] += action >> ACTIONS.index("like") & 1
    overall = (positive["all", 0] + 1) / (count["all", 0] + 2)
    expected, users, labels = [], [], []
    for row in rows["eval"]:
        for item, action in zip(row["candidate_item_id"], row["candidate_action"], strict=True):
            value = -logit(overall)
            for key, prior in ((("item", item), ITEM_PRIOR), (("user", row["user_id"]), USER_PRIOR)):
                value += logit((positive[key] + prior * overall) / (count[key] + prior))
            expected.append(value)
            users.append(row["user_id"])
            labels.append(action >> 1 & 1)
    assert result.logits[:, 0].tolist() == pytest.approx(expected)
    shares = [count_rates(config, info, ["like"], part, 3) for part in range(3)]
    for share in shares[1:]:
        shares[0].items.merge(np.arange(len(share.items.count)), share.items)
    together = TrainingRates(shares[0].items, join_users([share.users for share in shares]))
    assert (baseline_scores(config, info, ["like"], together).logits == result.logits).all()
    assert (sum(item_counts(config, info, part, 3) for part in range(3)) == item_counts(config, info)).all()
    assert result.user_id.tolist() == users
    assert result.labels[:, 0].tolist() == labels
    batches = build_loader(config, split="eval", rank=0, world_size=1)
    seen = np.concatenate([batch.labels.action.numpy() for batch in batches])
    assert weighted or (seen >> 1 & 1).tolist() == labels


def test_the_shipped_sample_is_small_licensed_whole_and_without_leak() -> None:
    assert sum(path.stat().st_size for path in SAMPLE.rglob("*") if path.is_file()) <= 6_000_000
    assert "Attribution-ShareAlike 4.0" in (SAMPLE / "LICENSE").read_text()
    assert "CIKM 2022" in (SAMPLE / "README.md").read_text()
    description = json.loads((SAMPLE / "dataset.json").read_text())
    config = DataConfig(path=str(SAMPLE), global_batch_size=4096, max_history_len=50, reader_threads=0)
    times: dict[str, list[int]] = {"train": [], "eval": []}
    for split in ("train", "eval"):
        samples = 0
        for batch in build_loader(config, split=split, rank=0, world_size=1):  # type: ignore[arg-type]
            samples += batch.global_samples
            is_candidate = batch.inputs.timestamp[batch.inputs.timestamp >= 0]
            times[split] += [int(is_candidate.min()), int(is_candidate.max())]
        assert samples == description["splits"][split]["samples"]
    assert max(times["train"]) < description["split_time"] <= max(times["eval"])
