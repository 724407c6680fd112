"""Paths of data as a job's nodes see them: what is relative to the caller's folder is made absolute, or refused."""

import json
from dataclasses import replace
from pathlib import Path

from launch.request import Request
from launch.workspace import ROOT, travels
from pipelines.config import SYNTHETIC_PATH
from trainer.config import TrainConfig


def with_absolute_data(request: Request, config: TrainConfig, *, runs_here: bool, in_container: bool) -> Request:
    """The request with data paths that name the same folder on every node.

    A job that runs here, in the caller's folder, keeps what it names there.  One that runs in a copy of the code or in
    a container keeps relative paths of data that travels with the code.

    Raises:
        ValueError: a relative path names nothing here, or in a container nothing that travels.
    """
    data = config.data
    path = _absolute("data.path", data.path, runs_here=runs_here, in_container=in_container)
    mix = [
        _absolute("data.mix_paths", entry, runs_here=runs_here, in_container=in_container) for entry in data.mix_paths
    ]
    overrides = list(request.overrides)
    if path != data.path:
        overrides = [*_without(overrides, "data.path"), f"data.path={path}"]
    if mix != list(data.mix_paths):
        overrides = [*_without(overrides, "data.mix_paths"), f"data.mix_paths={json.dumps(mix)}"]
    return replace(request, overrides=overrides)


def is_folder(path: str) -> bool:
    """Whether the data lies in a file system, not in an object store or nowhere."""
    return path != SYNTHETIC_PATH and "://" not in path


def _without(overrides: list[str], key: str) -> list[str]:
    return [override for override in overrides if override.partition("=")[0] != key]


def _absolute(key: str, text: str, *, runs_here: bool, in_container: bool) -> str:
    if not is_folder(text) or Path(text).is_absolute():
        return text
    here, in_checkout = Path.cwd() / text, ROOT / text
    named = here if here.exists() else in_checkout
    if not named.exists():
        raise ValueError(f"{key}={text} names nothing in {Path.cwd()}: give an absolute path")
    if runs_here:
        return text if named == here else str(named)
    if named.resolve() == in_checkout.resolve() and travels(in_checkout):
        return text
    if in_container:
        raise ValueError(f"{key}={text} does not travel with the code: give the absolute path that it has in the image")
    return str(named)
