"""Score requests by a trained run, in one process: what a server in Python, or a notebook, does.

with open_scorer("runs/shop") as scorer:
    predictions = scorer.score(requests)        # `pipelines.requests` says what a request is
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from embeddings.records import from_dict
from embeddings.trained import TrainedRows
from pipelines.loader import dataset_info
from pipelines.requests import InputBuilder, Request
from pipelines.vocabulary import check_same_ids, grown_spaces
from trainer.build import build_parallel, machine_of, make_plan
from trainer.checkpoint.catalogue import open_catalogue
from trainer.checkpoint.loading import load_checkpoint
from trainer.command_line import WrongUse
from trainer.config import TrainConfig
from trainer.labels.loss import RankingLoss
from trainer.mesh import discover_mesh, joined
from trainer.parallelize import ParallelModel
from trainer.resolve import resolve
from trainer.run_dir import RunDir


@dataclass(frozen=True, slots=True)
class Scorer:
    """A run's model, ready to be asked."""

    model: ParallelModel
    """`model.score(inputs, trained)` gives the outputs of all labels."""
    trained: TrainedRows
    """Ids without one of these rows read the unknown id's."""
    inputs: InputBuilder
    """From requests to inputs, on the host."""
    device: torch.device
    """The model's."""

    @torch.no_grad()
    def score(self, requests: Sequence[Request]) -> list[dict[str, list[float]]]:
        """Of each request, by label, a prediction a candidate in the label's own terms: of an action its probability.

        Raises ValueError for what `InputBuilder` refuses, and for a sequence longer than the model's.
        """
        inputs = self.model.known(self.inputs(requests).to(self.device))
        labels = self.model.model.loss
        assert isinstance(labels, RankingLoss)
        outputs = labels.outputs(self.model.score(inputs, self.trained))
        counts = inputs.num_candidates_host.tolist()
        by_label = {
            kind.name: torch.split(kind.predict(values).cpu(), counts)
            for kind, values in zip(labels.kinds, outputs, strict=True)
        }
        return [{name: parts[number].tolist() for name, parts in by_label.items()} for number in range(len(requests))]


@contextmanager
def open_scorer(run_dir: str | Path, step: int | None = None) -> Iterator[Scorer]:
    """The newest complete checkpoint of a ranker's run, or that of a step, on the device at hand.

    Raises:
        WrongUse: there is none, or the run is no ranker's.
        ValueError: the run's data set means something else by its ids now.
    """
    run = RunDir(Path(run_dir))
    saved = run.saved_config()
    if saved is None:
        raise WrongUse(f"{run_dir} holds no config.json: name a run directory that `train` made")
    config = from_dict(TrainConfig, saved)
    if config.model.retrieval is not None:
        raise WrongUse(f"{run_dir} has model.retrieval: requests are scored by rankers alone")
    catalogue, mesh = open_catalogue(run, config.checkpoint.store), discover_mesh()
    checkpoint = catalogue.choose(step)
    resolved, known = resolve(config, dataset_info(config.data)), run.saved_vocabularies()
    check_same_ids(known, resolved.info, data=config.data.path, other=f"the run of {run.path}")
    with joined(mesh):
        plan = make_plan(resolved, machine_of(mesh, config.placement.machine))
        model = build_parallel(resolved, plan, mesh)
        grown = grown_spaces(known, resolved.info)
        load_checkpoint(catalogue, checkpoint, model.tensors(), dist.new_group(backend="gloo"), grown)
        model.module.eval()
        yield Scorer(
            model=model,
            trained=model.trained_rows(mesh.device),
            inputs=InputBuilder(config.data, resolved.info, resolved.task.selection),
            device=mesh.device,
        )
