"""A process finds its place in the job, or says why it has none."""

import os
from pathlib import Path

import pytest
import torch

from tests.support.training import run_trainer
from trainer.command_line import WrongUse
from trainer.exit_status import FAILED, WRONG_USE
from trainer.parallel.mesh import discover_mesh

LAUNCHERS = {
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    "mpirun": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "mpiexec": ("PMI_SIZE", "PMI_RANK"),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_many_processes_that_do_not_know_of_one_another_are_refused_by_one(
    monkeypatch: pytest.MonkeyPatch, launcher: str
) -> None:
    count, number = LAUNCHERS[launcher]
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv(count, "16")
    monkeypatch.setenv(number, "0")
    monkeypatch.setattr(os, "isatty", lambda file: False)
    with pytest.raises(WrongUse, match=f"{launcher} has started 16 processes that do not know of one another: start "):
        discover_mesh()
    monkeypatch.setenv(number, "3")
    with pytest.raises(SystemExit) as silent:
        discover_mesh()
    assert silent.value.code == WRONG_USE
    monkeypatch.setattr(os, "isatty", lambda file: file == 0)
    assert discover_mesh().world_size == 1
    monkeypatch.setattr(os, "isatty", lambda file: False)
    # A step of one task, which torchrun or the launcher is started by, and what those start.
    monkeypatch.setenv(count, "1")
    assert discover_mesh().world_size == 1
    monkeypatch.setenv(count, "2")
    monkeypatch.setenv("RANK", "0")
    assert discover_mesh().world_size == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="GPUs meet by NCCL")
def test_an_interface_that_a_node_has_not_is_named(tmp_path: Path) -> None:
    arguments = ("train", "kuairand_sample", "--run-dir", str(tmp_path), "--set", "max_steps=2")
    status, output = run_trainer(*arguments, ranks=2, GLOO_SOCKET_IFNAME="eth9")
    assert status == FAILED
    assert "cannot reach the others by gloo" in output
    assert "Unable to find address for: eth9): see whether GLOO_SOCKET_IFNAME names an interface" in output
    assert "Traceback" not in output
