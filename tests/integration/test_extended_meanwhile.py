"""A data set that is extended while a run trains on it: the run goes on with what it began with."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines.prepare.__main__ import main as prepare
from pipelines.reading.loader import dataset_info
from pipelines.storage.dataset_json import read_dataset_info
from pipelines.storage.keys import read_keys
from tests.integration.test_next_day import write_day
from tests.support.distributed import run_ranks
from trainer.build import build_parallel, machine_of, make_plan
from trainer.parallel.alike import check_alike
from trainer.parallel.mesh import Mesh
from trainer.recipes import load_recipe
from trainer.resolve import Resolved, resolve

SCHEMA = """
user = "who"
item = "what"
time = "at"
time_unit = "s"
actions = ["did"]
action_values = ["buy", "skip"]
[items]
files = "items.csv"
columns = { brand = "brand", tags = { of = ["tag"], separator = "|" } }
"""


def deliver(folder: Path, day: int, items: int) -> list[str]:
    """A day's log and what is known of its items then: of some more than before, in words that are new."""
    write_day(folder, day, items)
    known = [f"i{item},b{day}-{item % 3},t{day}|t{item % 4}\n" for item in range(items - 5)]
    (folder / "items.csv").write_text("what,brand,tags\n" + "".join(known))
    return ["event_log", "--source", str(folder)]


def resolved_of(data: str) -> Resolved:
    recipe = load_recipe("own_log")
    config = replace(recipe, data=replace(recipe.data, path=data, reader_threads=0))
    return resolve(config, dataset_info(config.data))


def evaluated(data: str, extend: list[str]) -> list[dict[str, float]]:
    """What is measured by a run that began before the data set was extended: before that, and after it."""
    mesh = Mesh(rank=0, world_size=1, local_world_size=1, device=torch.device("cpu"))
    resolved = resolved_of(data)
    model = build_parallel(resolved, make_plan(resolved, machine_of(mesh)), mesh)
    before = resolved.task.evaluate(model, mesh).record()
    assert prepare(extend) == 0
    # What is counted is forgotten, as by a run that has not evaluated yet.
    del vars(resolved.task)["baselines"]
    return [before, resolved.task.evaluate(model, mesh).record()]


def test_evaluations_are_of_the_data_that_the_run_began_with(tmp_path: Path) -> None:
    data = str(tmp_path / "data")
    (tmp_path / "schema.toml").write_text(SCHEMA)
    first, second = deliver(tmp_path / "1", 0, 30), deliver(tmp_path / "2", 1, 45)
    assert prepare([*first, "--out", data, "--schema", str(tmp_path / "schema.toml")]) == 0
    known = read_dataset_info(data).spaces["item"]
    [(before, after)] = run_ranks(1, evaluated, data, [*second, "--extend", data])
    assert after == before
    # A server that began then knows none of the new items; one that begins now does.
    for space, knows in ((known, False), (read_dataset_info(data).spaces["item"], True)):
        to_id, _ = read_keys(data, space)
        assert to_id("i1") > 0 and (to_id("i44") > 0) == knows


def refused(data: str) -> str:
    """What a rank is told that sees another description than the first one."""
    rank = torch.distributed.get_rank()
    mesh = Mesh(rank=rank, world_size=2, local_world_size=1, device=torch.device("cpu"))
    resolved = resolved_of(data)
    check_alike(mesh, {}, resolved)
    info = replace(resolved.info, parts=(*resolved.info.parts, "part=00001")) if rank else resolved.info
    with pytest.raises(ValueError, match=r"reads another dataset\.json") as told:
        check_alike(mesh, {}, replace(resolved, info=info))
    return str(told.value)


def test_ranks_that_see_different_data_are_refused_alike(tmp_path: Path) -> None:
    data = str(tmp_path / "data")
    (tmp_path / "schema.toml").write_text(SCHEMA)
    assert prepare([*deliver(tmp_path / "1", 0, 30), "--out", data, "--schema", str(tmp_path / "schema.toml")]) == 0
    first, second = run_ranks(2, refused, data)
    assert first == second and "rank 1" in first
