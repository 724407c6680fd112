"""The retriever in real jobs: the same on one rank and on two, resumed or not, evaluated apart, against plain numpy."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch

from pipelines.storage.dataset_json import read_dataset_info
from tests.support.small_data import small_dataset
from tests.support.training import losses, read_checkpoint, read_lines, run_trainer, train

STEPS = 6
METRICS = ("hr@10", "hr@50", "ndcg@10", "ndcg@50", "mrr")
OVERRIDES = (
    f"max_steps={STEPS}",
    "checkpoint.every_steps=3",
    "model.input.dropout=0.0",
    "model.retrieval.num_negatives=20",
    "model.retrieval.corpus_chunk=1000",
    "model.retrieval.exclude_seen=true",
)


def retrieve(run: Path, ranks: int, *overrides: str) -> list[dict[str, float]]:
    return train(run, ranks, *OVERRIDES, *overrides, recipe="kuairand_retrieval")


def evaluations(run: Path) -> dict[str, float]:
    (line,) = read_lines(run / "eval.jsonl")
    return {name: line[name] for name in METRICS}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps on two ranks, shared negatives."""
    run = tmp_path_factory.mktemp("retrieval") / "run"
    retrieve(run, 2)
    return run


MIXTURE = (
    'model.retrieval.similarity={"kind":"mixture_of_logits","query_vectors":2,"item_vectors":2,"dim":8,"hidden":4}'
)


@pytest.mark.parametrize("setting", [None, "model.retrieval.share_negatives=false", MIXTURE])
def test_two_ranks_train_and_evaluate_like_one(two_ranks: Path, setting: str | None, tmp_path: Path) -> None:
    """Losses, tables, optimizers and metrics: shared negatives, each prediction's own, a head with parameters."""
    pair = two_ranks
    settings = () if setting is None else (setting,)
    if settings:
        pair = tmp_path / "pair"
        retrieve(pair, 2, *settings)
    single = retrieve(tmp_path / "one", 1, *settings)
    assert losses(single) == pytest.approx(losses(read_lines(pair / "metrics.jsonl")), rel=1e-5)
    assert evaluations(tmp_path / "one") == pytest.approx(evaluations(pair), abs=1e-3)
    found, wanted = (read_checkpoint(run / "checkpoints" / f"step-{STEPS:08d}") for run in (tmp_path / "one", pair))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_resumed_on_another_number_of_ranks_goes_on_alike(two_ranks: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    retrieve(run, 1, "max_steps=3")
    resumed = retrieve(run, 3)
    assert losses(resumed) == pytest.approx(losses(read_lines(two_ranks / "metrics.jsonl")), rel=1e-5)


def test_evaluate_repeats_the_metrics_of_the_checkpoint(two_ranks: Path) -> None:
    """And they are those of plain numpy on the saved tensors, for the rank by popularity as well."""
    before = evaluations(two_ranks)
    status, output = run_trainer("evaluate", str(two_ranks))
    assert status == 0, output[-3000:]
    # The step stands in eval.jsonl already, so the table on the screen is what is new.
    table = next(line.split() for line in output.splitlines() if line.startswith("model "))
    assert [float(value) for value in table[1:]] == pytest.approx(list(before.values()), abs=1e-3)
    popularity = next(line.split() for line in output.splitlines() if line.startswith("popularity"))
    ranks = popularity_ranks()
    assert float(popularity[1]) == pytest.approx(np.mean(ranks <= 10), abs=1e-4)
    assert float(popularity[5]) == pytest.approx(np.mean(1 / ranks), abs=1e-4)


def popularity_ranks() -> np.ndarray:
    """Of every evaluation candidate with an event in front of it, earlier items and the unknown one left out."""
    data, longest = small_dataset(), 24
    num_items = read_dataset_info(str(data)).num_items
    tables = {split: parquet.read_table(data / split).to_pydict() for split in ("train", "eval")}
    counts = np.zeros(num_items, dtype=int)
    for column in ("history_item_id", "candidate_item_id"):
        for items in tables["train"][column]:
            np.add.at(counts, items, 1)
    ranks = []
    for history, candidates in zip(
        *(tables["eval"][f"{kind}_item_id"] for kind in ("history", "candidate")), strict=True
    ):
        events = [*history[-longest:], *candidates]
        for place in range(len(events) - len(candidates), len(events)):
            if place:
                at_least = counts >= counts[events[place]]
                at_least[[0, events[place], *events[:place]]] = False
                ranks.append(1 + at_least.sum())
    return np.array(ranks)
