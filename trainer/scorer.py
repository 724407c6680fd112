"""Score requests by a trained run, in one process: what a server in Python, or a notebook, does.

with open_scorer("runs/shop") as scorer:
    predictions = scorer.score(requests)        # `pipelines.batches.requests` says what a request is
    items = scorer.retrieve(requests, 100)      # of a run with model.retrieval
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from embeddings.rows.trained import TrainedRows
from pipelines.batches.requests import InputBuilder, Request
from pipelines.features import ITEM_SPACE
from pipelines.reading.loader import dataset_info
from pipelines.storage.keys import read_names
from trainer.build import build_parallel, machine_of, make_plan
from trainer.checkpoint.catalogue import open_catalogue
from trainer.checkpoint.loading import load_checkpoint
from trainer.evaluation.corpus import join_seen
from trainer.evaluation.next_item import corpus_of
from trainer.parallel.mesh import Mesh, discover_mesh, joined
from trainer.parallelize import ParallelModel
from trainer.resolve import Resolved, resolve_again
from trainer.run.run_dir import RunDir


@dataclass(frozen=True, slots=True)
class Scorer:
    """A run's model, ready to be asked."""

    resolved: Resolved
    """The run's configuration and data."""
    mesh: Mesh
    """The process and its device, as a job of one rank."""
    model: ParallelModel
    """`model.score(inputs, trained)` gives a ranker's outputs of all labels."""
    trained: TrainedRows
    """Ids without one of these rows read the unknown id's."""
    inputs: InputBuilder
    """From requests to inputs, on the host."""
    key_of: Callable[[int], Any]
    """From ids of items to keys of the log."""

    @property
    def device(self) -> torch.device:
        """The device that the model computes on."""
        return self.mesh.device

    @torch.no_grad()
    def score(self, requests: Sequence[Request]) -> list[dict[str, list[float]]]:
        """A prediction a candidate, by label, for each request, in the label's own terms: an action's probability.

        Raises ValueError for what `InputBuilder` refuses, for a sequence longer than the model's, and of a model that
        predicts the next item alone.
        """
        inputs = self.model.known(self.inputs(requests).to(self.device))
        labels, outputs_CK = self.resolved.task.rank(self.model, inputs, self.trained)
        counts = inputs.num_candidates_host.tolist()
        by_label = {
            kind.name: torch.split(kind.predict(values).cpu(), counts)
            for kind, values in zip(labels.kinds, labels.outputs(outputs_CK), strict=True)
        }
        return [{name: parts[number].tolist() for name, parts in by_label.items()} for number in range(len(requests))]

    @torch.no_grad()
    def retrieve(self, requests: Sequence[Request], count: int = 10) -> list[list[tuple[Any, float]]]:
        """The `count` items that are likeliest to come next, (key, score), best first, for each request.

        A request has a history and no candidates.  Items without a key are left out, and those of the history where
        `model.retrieval.exclude_seen` says so.  Raises ValueError as `score`, and of a model that ranks alone.
        """
        info, settings = self.resolved.info, self.resolved.config.model.retrieval
        known = info.spaces[ITEM_SPACE].used
        if not 1 <= count < known:
            raise ValueError(f"count must lie in [1, {known - 1}], the items that have a key, got {count}")
        batch = self.inputs.batch(self.inputs.without_candidates(requests))
        similarity, found = self.resolved.task.next_items(self.model, batch, self.mesh)
        assert settings is not None
        seen = join_seen([found.seen], [len(requests)])
        corpus = corpus_of(
            self.model, similarity, torch.zeros(known, device=self.device), mesh=self.mesh, settings=settings
        )
        scores, items = corpus.best(similarity.queries(found.outputs_PE), seen, count)
        return [
            [(self.key_of(item), score) for item, score in zip(*each, strict=True) if score > -torch.inf]
            for each in zip(items.tolist(), scores.tolist(), strict=True)
        ]


@contextmanager
def open_scorer(run_dir: str | Path, step: int | None = None, data: str | Path | None = None) -> Iterator[Scorer]:
    """The newest complete checkpoint of a run, or that of a step, on the device at hand; `data` is where the run's data
    set lies now, None for where it was trained.

    Raises:
        WrongUse: there is none.
        ValueError: the run's data set means something else by its ids now.
    """
    # TorchRec asks torch.fx whether it is being traced, and torch warns of the question itself.
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    run = RunDir(Path(run_dir))
    config = run.trained_config()
    if data is not None:
        config = replace(config, data=replace(config.data, path=str(data)))
    catalogue, mesh = open_catalogue(run, config.checkpoint.store), discover_mesh()
    checkpoint = catalogue.choose(step)
    resolved, grown = resolve_again(config, dataset_info(config.data), run.saved_vocabularies(), run.path)
    with joined(mesh):
        plan = make_plan(resolved, machine_of(mesh, config.placement.machine))
        model = build_parallel(resolved, plan, mesh)
        with warnings.catch_warnings():
            # TorchRec's tables are ShardedTensors, of which a server need not hear.
            warnings.filterwarnings("ignore", "Please use DTensor instead", FutureWarning)
            load_checkpoint(catalogue, checkpoint, model.tensors(), dist.new_group(backend="gloo"), grown)
        model.module.eval()
        yield Scorer(
            resolved=resolved,
            mesh=mesh,
            model=model,
            trained=model.trained_rows(mesh.device),
            inputs=InputBuilder(config.data, resolved.info, resolved.task.selection),
            key_of=read_names(config.data.path, resolved.info.spaces[ITEM_SPACE]),
        )
