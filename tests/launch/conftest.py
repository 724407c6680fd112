"""Slurm for tests: a real cluster."""

import os
from collections.abc import Iterator

import pytest

from launch import records
from tests.support.slurm import Cluster, missing_programs, slurm_cluster


@pytest.fixture(scope="session")
def running_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One for all modules: two on one machine would take each other's names."""
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", running_cluster.environment["SLURM_CONF"])
        # Jobs inherit it: with other numbers of threads, sums differ in their last bits.
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(records, "FILE", running_cluster.folder / "jobs.jsonl")
        yield running_cluster
