"""Memory of a step is what autograd keeps, and with tables and parameters what GPUs were seen to hold."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.cost import made_up_batch
from benchmarks.step import make_cases
from embeddings.machine import Machine
from embeddings.planning.problem import GIB
from embeddings.tables import build_tables, init_tables
from pipelines.reading.loader import dataset_info
from trainer.build import make_plan
from trainer.models.activations import MeanBatch
from trainer.parallel.mesh import Mesh
from trainer.recipes import load_recipe
from trainer.resolve import Resolved, resolve
from trainer.typed_values import apply_overrides

ROOT = Path(__file__).resolve().parents[3]
SAMPLES, HISTORY = 2, 150
LONG = ("model.max_len=200", "data.max_history_len=150", "model.layer.dropout=0.0", "model.input.dropout=0.0")
STAGES = '[{"num_layers":2,"local":16},{"num_layers":3,"keep_newest":40}]'
CHANNELS = (
    '[{"name":"all","dim":64,"stages":[{"num_layers":2}]},{"name":"narrow","dim":32,"stages":[{"num_layers":3}]}]'
)
# With 8 candidates at most, the longest sequence is the batch's.
PADDED = ("model.max_len=151", "data.max_history_len=143")
KEPT = ("model.layer.recompute_normed=false", "model.layer.recompute_uvqk=false", "model.layer.recompute_gated=false")
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "a ranker": ("kuairand_sample", ()),
    "nothing recomputed": ("kuairand_sample", KEPT),
    "production": ("kuairand_sample", ("model.layer.variant=production", *KEPT)),
    "interleaved": ("kuairand_sample", ("model.input.merge=interleave", "model.max_len=400")),
    "stages": ("kuairand_sample", (f"model.stages={STAGES}",)),
    "channels": ("kuairand_sample", ("model.stages=[]", f"model.channels={CHANNELS}")),
    "a hidden layer over columns": ("kuairand_sample", ("model.input.combine=mlp",)),
    "a retriever": ("kuairand_retrieval", ()),
    "a full softmax": ("kuairand_retrieval", ("model.retrieval.num_negatives=null",)),
    "relative biases": (
        "kuairand_retrieval",
        (
            *PADDED,
            'model.layer.relative_bias={"num_time_buckets":16}',
        ),
    ),
    "a Transformer": (
        "kuairand_retrieval",
        (
            *PADDED,
            "model.layer.variant=softmax",
        ),
    ),
}


def kept_by_autograd(resolved: Resolved) -> int:
    """Bytes that a forward pass leaves for the backward pass, without parameters, ids and looked-up rows."""
    tables = build_tables(resolved.tables, device=torch.device("cpu"))
    init_tables(tables, 0)
    model = resolved.task.build(tables)
    mesh = Mesh(rank=0, world_size=1, local_world_size=1, device=torch.device("cpu"))
    batch = resolved.task.prepare(made_up_batch(resolved, np.full(SAMPLES, HISTORY)), mesh)
    held = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    # Kept alive, so that no two tensors have one address.
    alive: list[Any] = []

    def looked_up(module: Any, arguments: Any, rows: Any) -> None:
        del module, arguments
        alive.append(rows)
        held.update(value.values().untyped_storage().data_ptr() for part in rows for value in part.values())

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        alive.append(tensor)
        if storage.data_ptr() not in held:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tables.register_forward_hook(looked_up)
    model.train()
    held.add(batch.inputs.features.values().untyped_storage().data_ptr())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(batch)
    return sum(kept.values())


@pytest.mark.parametrize("case", CASES)
def test_what_is_counted_as_kept_is_what_autograd_keeps(case: str) -> None:
    recipe, settings = CASES[case]
    config = apply_overrides(load_recipe(recipe), [*LONG, *settings])
    resolved = resolve(config, dataset_info(config.data))
    batch = MeanBatch(samples=SAMPLES, history=HISTORY, candidates=1, num_context=resolved.num_context, value_bytes=4)
    counted = resolved.task.activations(batch)
    assert counted.kept == pytest.approx(kept_by_autograd(resolved), rel=0.08)
    assert counted.peak > counted.kept


SEEN = json.loads((ROOT / "benchmarks/results/step_h200.json").read_text())["rows"]


@pytest.mark.parametrize("name", SEEN)
def test_the_peaks_of_whole_steps_on_an_h200_are_counted(name: str) -> None:
    """Tables, parameters, activations and batches, as a plan counts them without a run, beside what a GPU held."""
    case = make_cases(small=False)[name]
    lens = case.history_lens
    config = apply_overrides(case.config, [f"data.global_batch_size={len(lens)}"])
    info = dataset_info(config.data)
    train = replace(info.splits["train"], samples=len(lens), history_events=int(lens.sum()), candidates=len(lens))
    resolved = resolve(config, replace(info, splits={**info.splits, "train": train}))
    machine = Machine(world_size=1, local_world_size=1, compute_device="cuda", hbm_gib=139.8)
    plan = make_plan(resolved, machine)
    # One process has no bucket of gradients.
    held = plan.ranks[0].memory_bytes + plan.reservation.dense_bytes * 4 // 5 + plan.reservation.activation_bytes
    assert held / GIB == pytest.approx(SEEN[name]["peak_gib"], rel=0.05)
