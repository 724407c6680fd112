"""Which runs a sweep is."""

from pathlib import Path

import pytest

from launch.sweep import runs_of, values_of
from tests.launch.test_component import request


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0..3", ["0", "1", "2", "3"]),
        ("-1..1", ["-1", "0", "1"]),
        ("256,512", ["256", "512"]),
        ("a", ["a"]),
        ("s3://a..b", ["s3://a..b"]),
        ("[1,2],[3]", ["[1,2]", "[3]"]),
        ('{"a":[1,2],"b":"x,y"},null', ['{"a":[1,2],"b":"x,y"}', "null"]),
        ('"a,b"', ['"a,b"']),
    ],
)
def test_values(text: str, values: list[str]) -> None:
    assert values_of(text) == values


def test_every_combination_is_a_run_with_a_directory_that_says_so() -> None:
    base = request(run_dir=Path("/runs/s"), overrides=["model.dim=256,512", "max_steps=9", "seed=0..2"])
    runs = runs_of(base)
    assert len(runs) == 6
    assert runs[4].run_dir == Path("/runs/s/dim=512,seed=1")
    assert runs[4].overrides == ["model.dim=512", "max_steps=9", "seed=1"]
    assert len({run.run_dir for run in runs}) == 6


def test_values_that_are_no_names_still_have_directories_of_their_own() -> None:
    runs = runs_of(request(overrides=["data.path=/a/b,/c/d"]))
    names = [run.run_dir.name for run in runs if run.run_dir]
    assert len(set(names)) == 2
    assert all(name.startswith("path=") and "/" not in name for name in names)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=1"], "a sweep needs an override with several values"),
        ([], "a sweep needs an override with several values"),
        (["seed=0..1000"], "more than 1000 runs"),
        (["seed=0,1", "checkpoint.store=s3://bucket/run"], "would be the store of every run of the sweep"),
        (["seed"], "override 'seed' is not of the form key=value"),
    ],
)
def test_what_is_no_sweep_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        runs_of(request(overrides=overrides))
