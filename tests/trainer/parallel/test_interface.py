"""Machines of a job that know their own name as their loopback, or not at all, find each other."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.training import ROOT
from trainer.parallel.interface import interface_towards

# As Debian and Ubuntu write it; and a machine that nobody has told its own name.
HOSTS = {"a": "127.0.0.1 localhost\n127.0.1.1 longview-a\n", "b": "127.0.0.1 localhost\n"}

RANK = """
import torch
import torch.distributed as dist
from trainer.parallel.mesh import discover_mesh, joined
with joined(discover_mesh()):
    total = torch.ones(())
    dist.all_reduce(total)
    group = dist.new_group(backend="gloo")
    dist.all_reduce(total, group=group)
print(total.item())
"""

# Two machines and the cable between them, in a network of their own.
NETWORK = """
ip link add lva type veth peer name lvb
for name in a b; do
    cd "$FOLDER/$name"
    unshare --net --uts --mount sh -ec "$MACHINE" > output 2>&1 &
    until [ -s pid ]; do sleep 0.05; done
    ip link set "lv$name" netns "$(cat pid)"
done
wait
"""

MACHINE = """
hostname "longview-$name"
mount --bind hosts /etc/hosts
ip link set lo up
echo $$ > pid
until ip link set "lv$name" up 2> /dev/null; do sleep 0.05; done
case "$name" in a) RANK=0 ;; b) RANK=1 ;; esac
ip address add "10.213.0.$((RANK + 1))/24" dev "lv$name"
export RANK LOCAL_RANK=0 WORLD_SIZE=2 LOCAL_WORLD_SIZE=1 MASTER_ADDR=10.213.0.1 MASTER_PORT=29500
exec "$PYTHON" -W ignore -c "$CODE"
"""


def test_the_interface_of_an_address_is_found() -> None:
    assert interface_towards("127.0.0.1", 1) == "lo"


def test_machines_whose_own_name_is_their_loopback_meet(tmp_path: Path) -> None:
    separate = ["unshare", "--net", "--uts", "--mount"]
    cable = [*separate, "ip", "link", "add", "lva", "type", "veth", "peer", "name", "lvb"]
    if not shutil.which("ip") or subprocess.run(cable, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs root and iproute2, for two machines with a network of their own")
    for name, hosts in HOSTS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "hosts").write_text(hosts)
    scripts = {"FOLDER": str(tmp_path), "MACHINE": MACHINE, "PYTHON": sys.executable, "CODE": RANK, "name": ""}
    environment = {**os.environ, **scripts, "PYTHONPATH": str(ROOT), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    # Whatever runs there ends with this command.
    command = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-ec", NETWORK]
    subprocess.run(command, env=environment, timeout=120, check=True)
    assert [(tmp_path / name / "output").read_text() for name in HOSTS] == ["4.0\n"] * 2
