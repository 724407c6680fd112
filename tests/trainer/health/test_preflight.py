"""Checks before the first step."""

import logging
import os
import re
import signal
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.support.distributed import run_ranks
from trainer.health import preflight
from trainer.health import slow_ranks as slow_ranks_module
from trainer.health.fitness import UnfitNodes, facts_here
from trainer.health.preflight import check_fp8, check_kernels, check_nodes
from trainer.health.slow_ranks import check_ranks, rounds, slow_ranks
from trainer.models.layer_config import LayerConfig
from trainer.models.relative_config import RelativeBiasConfig
from trainer.parallel.mesh import Mesh, joined


def test_fp8_is_refused_on_a_gpu_without_it_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = (8, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(ValueError, match=r"capability 8.9 or above.*NVIDIA A100 has none: set fp8=false"):
        check_fp8(torch.device("cuda"))
    check_fp8(torch.device("cpu"))
    capability = (9, 0)
    check_fp8(torch.device("cuda"))


def test_only_layers_that_have_the_attention_kernels_wait_for_their_check(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[tuple[int, bool]] = []

    def check(device: torch.device, dtype: torch.dtype, key_size: int, value_size: int, *, biased: bool) -> None:
        checked.append((key_size, biased))

    monkeypatch.setattr(preflight, "check_attention", check)
    plain = LayerConfig(qk_dim=32)
    others = LayerConfig(relative_bias=RelativeBiasConfig()), LayerConfig(variant="softmax")
    check_kernels(torch.device("cuda"), [plain, *others, plain], torch.bfloat16)
    assert checked == [(32, False), (128, True)]


def test_slow_ranks_are_named_with_their_host() -> None:
    ranks = [("a", 1.0), ("a", 1.1), ("b", 1.0), ("b", 2.0)]
    assert slow_ranks("a product", ranks, 1.3) == [
        "rank 3 on b takes 2.00 ms for a product, the median rank 1.05: all wait for it"
    ]
    assert slow_ranks("a product", [("a", 0.0), ("b", 0.0)], 1.3) == []


@pytest.mark.parametrize("length", range(1, 10))
def test_every_two_neighbours_in_a_ring_exchange_alone(length: int) -> None:
    found = rounds(length)
    pairs = [frozenset(pair) for pairs in found for pair in pairs]
    assert set(pairs) == {frozenset((i, (i + 1) % length)) for i in range(length) if length > 1}
    assert len(pairs) == len(set(pairs))
    for in_round in found:
        members = [place for pair in in_round for place in pair]
        assert len(members) == len(set(members))


def _store(run_dir: Path) -> dist.Store:
    return dist.FileStore(str(run_dir / "store"), dist.get_world_size())


def _check_three(run_dir: Path) -> tuple[str, str]:
    """Three nodes of a process each; the second has a slow network and another Python, the third another disk."""
    rank = dist.get_rank()
    mesh = Mesh(rank=rank, world_size=3, local_world_size=1, device=torch.device("cpu"))
    os.environ["SLURMD_NODENAME"] = f"n{rank}"
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("trainer.health.slow_ranks")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    with pytest.MonkeyPatch.context() as patch:
        real = slow_ranks_module._exchange

        def late(sent: Tensor, received: Tensor, partner: int) -> None:
            signal.sigtimedwait([], 0.3)
            real(sent, received, partner)

        if rank == 1:
            patch.setattr(slow_ranks_module, "_exchange", late)
            patch.setattr(preflight, "facts_here", lambda token: replace(facts_here(token), python="2.7"))
        check_ranks(mesh)
        try:
            check_nodes(mesh, _store(run_dir), run_dir / "elsewhere" if rank == 2 else run_dir)
        except UnfitNodes as unfit:
            return "\n".join(heard), str(unfit)
    return "\n".join(heard), "fit"


def test_nodes_are_compared_and_the_slow_one_is_named_whatever_has_started_them(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (heard, unfit), second, third = run_ranks(3, _check_three, tmp_path)
    slow, figures = heard.splitlines()
    assert re.match(
        r"rank 1 on .* takes \d+\.\d\d ms for an exchange of 1 MiB with other nodes, the median rank ", slow
    )
    assert re.match(
        r"all-reduce of 4 MiB over 3 ranks: \d+\.\d\d GB/s; an exchange of 1 MiB with other nodes: ", figures
    )
    assert second == third == ("", unfit)
    python, disk = unfit.split("; node n2: ")
    assert re.match(r"node n1: its Python is 2\.7, the first node's 3\.", python)
    assert disk.startswith("it does not see what the first node has written")
    assert list((tmp_path / "logs").iterdir()) == []


def test_one_rank_has_no_exchange_to_tell_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for collective in ("all_gather_object", "all_reduce", "barrier"):
        monkeypatch.setattr(dist, collective, lambda *_: None)
    with caplog.at_level(logging.INFO):
        check_ranks(Mesh(rank=0, world_size=1, local_world_size=1, device=torch.device("cpu")))
    assert caplog.messages == []


def test_a_node_that_does_not_answer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "logs").mkdir()
    monkeypatch.setattr(preflight, "ANSWER_S", 1)
    mesh = Mesh(rank=0, world_size=4, local_world_size=2, device=torch.device("cpu"))
    with pytest.raises(UnfitNodes, match="the node of rank 2 has not answered in 1 s: it may run other code"):
        check_nodes(mesh, dist.HashStore(), tmp_path)


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


def test_a_job_of_one_closes_its_group_after_an_error_too() -> None:
    """NCCL complains of one left open after the last line, which is the error's."""
    mesh = Mesh(rank=0, world_size=1, local_world_size=1, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="bad input"), joined(mesh):
        raise ValueError("bad input")
    assert not dist.is_initialized()
