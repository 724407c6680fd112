"""Items to come, named for requests in plain Python: the ranks are those of the evaluation."""

from pathlib import Path

import pytest
import torch

from pipelines.reading.loader import build_loader
from tests.trainer.test_scorer import GOOD, prepare_shop, run, stored_requests
from trainer.evaluation.next_item import corpus_of
from trainer.scorer import Scorer, open_scorer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With data/shop."""
    folder = tmp_path_factory.mktemp("retrieving")
    prepare_shop(folder)
    return folder


@torch.no_grad()
def check_retrieved(folder: Path, scorer: Scorer) -> None:
    """The items' ranks are those of the evaluation."""
    task, info = scorer.resolved.task, scorer.resolved.info
    requests = stored_requests(folder, scorer)
    first, seen_ranks = 0, set()
    selection = scorer.inputs._selection
    data = scorer.resolved.config.data
    for batch in build_loader(data, split="eval", rank=0, world_size=1, selection=selection):
        mine = requests[first : first + batch.global_samples]
        first += batch.global_samples
        similarity, found = task.next_items(scorer.model, batch, scorer.mesh)
        corpus = corpus_of(
            scorer.model, similarity, torch.zeros(info.spaces["item"].used), mesh=scorer.mesh, settings=task.settings
        )
        none = torch.empty(2, 0, dtype=torch.long)
        ranks = corpus.ranks(similarity.queries(found.outputs_PE), found.targets_P, none)[0]
        # A retriever is evaluated on every candidate, of which a request asks for the first.
        counts = batch.inputs.num_candidates_host if len(ranks) > len(mine) else torch.ones(len(mine), dtype=torch.long)
        firsts = torch.cumsum(counts, 0) - counts
        asked = [{**each, "candidate": {"timestamp": each["candidate"]["timestamp"][:1].tolist()}} for each in mine]
        known = info.spaces["item"].used
        for request, items, row in zip(mine, scorer.retrieve(asked, known - 1), firsts.tolist(), strict=True):
            keys, scores = zip(*items, strict=True)
            assert len(set(keys)) == len(keys) == known - 1 and list(scores) == sorted(scores, reverse=True)
            assert keys.index(request["candidate"]["item_id"][0]) + 1 == ranks[row]
            seen_ranks.add(int(ranks[row]))
        few = scorer.retrieve(asked[:3])
        assert few == [items[:10] for items in scorer.retrieve(asked[:3], known - 1)]
    assert first == len(requests) > 10 and len(seen_ranks) > 10


def test_a_retriever_names_the_items_that_its_evaluation_ranks(folder: Path) -> None:
    settings = (f"data.path={folder / 'data/shop'}", "max_steps=4", "model.retrieval.num_negatives=20")
    with open_scorer(run(folder, "retriever", *settings, recipe="kuairand_retrieval")) as scorer:
        check_retrieved(folder, scorer)
        with pytest.raises(ValueError, match="predicts the next item and no labels: ask it by retrieve"):
            scorer.score([GOOD])
        with pytest.raises(ValueError, match="request 0 has the candidate column 'item_id', but is asked for"):
            scorer.retrieve([GOOD])
        with pytest.raises(ValueError, match="request 1 has no history"):
            scorer.retrieve([{"event": GOOD["event"]}, {"event": {"item_id": [], "action": [], "timestamp": []}}])
        with pytest.raises(ValueError, match=r"count must lie in \[1, 4\d\]"):
            scorer.retrieve([{"event": GOOD["event"]}], 50)


def test_a_joint_model_scores_and_names_items_as_its_evaluation_does(folder: Path) -> None:
    settings = (
        f"data.path={folder / 'data/shop'}",
        "max_steps=4",
        "data.unknown_share=0",
        "model.input.causal=true",
        'model.retrieval={"beside_ranking":0.1,"num_negatives":20,"temperature":0.2}',
    )
    with open_scorer(run(folder, "joint", *settings)) as scorer:
        check_retrieved(folder, scorer)
        requests, data = stored_requests(folder, scorer), scorer.resolved.config.data
        (batch,) = build_loader(data, split="eval", rank=0, world_size=1, selection=scorer.inputs._selection)
        with torch.no_grad():
            expected = scorer.model.score(batch.inputs).labels_CK
        flat = [value for each in scorer.score(requests) for value in each["buy"]]
        assert flat == torch.sigmoid(expected[:, 1].double()).tolist()
