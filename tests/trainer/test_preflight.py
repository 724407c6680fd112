"""Checks before the first step."""

import logging
import re
import socket

import pytest
import torch
import torch.distributed as dist

from tests.support.distributed import run_ranks
from trainer.mesh import Mesh, joined
from trainer.preflight import check_fp8, check_ranks, slow_ranks


def test_fp8_is_refused_on_a_gpu_without_it_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = (8, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(ValueError, match=r"capability 8.9 or above.*NVIDIA A100 has none: set fp8=false"):
        check_fp8(torch.device("cuda"))
    check_fp8(torch.device("cpu"))
    capability = (9, 0)
    check_fp8(torch.device("cuda"))


def test_slow_ranks_are_named_with_their_host() -> None:
    ranks = [("a", 1.0), ("a", 1.1), ("b", 1.0), ("b", 2.0)]
    assert slow_ranks(ranks) == ["rank 3 on b takes 2.00 ms for a product, the median rank 1.10: all wait for it"]
    assert slow_ranks([("a", 0.0), ("b", 0.0)]) == []


def _check_two() -> str:
    mesh = Mesh(rank=dist.get_rank(), world_size=2, local_world_size=2, device=torch.device("cpu"))
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("trainer.preflight")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    check_ranks(mesh)
    return "\n".join(heard)


def test_the_first_collective_is_tried_and_its_rate_told_once() -> None:
    first, second = run_ranks(2, _check_two)
    assert re.fullmatch(r"all-reduce of 4 MiB over 2 ranks: \d+\.\d\d GB/s", first)
    assert second == ""


def test_processes_that_cannot_meet_say_where(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name, value in {
            "RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }.items():
            monkeypatch.setenv(name, value)
        mesh = Mesh(rank=0, world_size=2, local_world_size=2, device=torch.device("cpu"))
        with pytest.raises(ConnectionError, match=f"cannot meet at 127.0.0.1:{port}"), joined(mesh):
            pass
