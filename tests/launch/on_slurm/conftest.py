"""Slurm for tests: real clusters."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from launch import records
from tests.support.slurm import Cluster, missing_programs, slurm_cluster


@pytest.fixture(scope="session")
def running_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """This machine's Slurm: one cluster for all modules."""
    missing = missing_programs()
    if missing or os.geteuid() != 0:
        reason = f"needs root and Slurm (missing: {missing}): python -m tests.support.slurm install"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="module")
def cluster(running_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, known to the launcher for the duration of a module."""
    with known(running_cluster):
        yield running_cluster


@contextmanager
def known(cluster: Cluster) -> Iterator[None]:
    """Have the launcher, and Slurm's commands, know a cluster for the duration of the block."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.environment.items():
            patch.setenv(name, value)
        # Jobs inherit it: with other numbers of threads, sums differ in their last bits.
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(records, "FILE", cluster.folder / "jobs.jsonl")
        yield
