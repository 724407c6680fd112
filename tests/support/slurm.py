"""A real Slurm on this machine: Debian's slurmctld, slurmd and munge, in a folder of their own.

Two nodes run jobs, each in a rack of its own.  Four more have 8 GPUs each, made up of plain files, and say which
requests Slurm accepts; on two of them jobs of the partition `low` make way for those of `urgent`.  Two hundred others
are down, for jobs that only wait.

    python -m tests.support.slurm install        # Debian's packages, and Debian 13 in a folder; needs root
    python -m tests.support.slurm run FOLDER     # start a cluster, print how to use it, stop it on Ctrl-C

There is no accounting database, as on many small clusters, and no name service: nodes' names are known to Slurm only.
Needs root, as which slurmd runs.
"""

import fcntl
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support import debian13

PROGRAMS = ("unshare", "setpriv", "munged", "slurmctld", "slurmd", "sbatch", "srun", "sinfo", "scontrol")
NODES = ("longview-n1", "longview-n2")
GPU_NODES = ("longview-g1", "longview-g2", "longview-g3", "longview-g4")
UNSHARED = "unshared"
"""A folder of the cluster's own that the last node does not share."""
STARTS = Path("/tmp/longview-slurm.lock")
"""Locked while a cluster starts: other checkouts and test runs of this machine start theirs later."""
COMMANDS = ("sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun", "sacct")
START_TIMEOUT_S = 60.0

_CONFIG = """\
ClusterName=longview
SlurmctldHost={host}
SlurmctldPort={controller_port}
SlurmUser=root
AuthType=auth/munge
# A requeued job waits for its old credentials to expire, by default 120 s.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdSpoolDir={folder}/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
# A requeued job starts when one of these loops looks at it again: by default every 60 and 30 s.
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
TopologyPlugin=topology/tree
NodeName={nodes} NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first_port}-{last_port}] CPUs=2 RealMemory={memory_mib}
PartitionName=main Nodes={nodes} Default=YES State=UP PreemptMode=OFF
GresTypes=gpu
NodeName={gpu_nodes} NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first_gpu_port}-{last_gpu_port}] CPUs=192 \
RealMemory=2000000 Gres=gpu:8
PartitionName=gpu Nodes={gpu_nodes} State=UP PreemptMode=OFF MaxTime=12:00:00
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=low Nodes=longview-g[1-2] State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=40
PartitionName=urgent Nodes=longview-g[1-2] State=UP PriorityTier=9 PreemptMode=OFF
NodeName=longview-w[1-200] NodeAddr=127.0.0.1 CPUs=2 RealMemory=8000 State=DOWN
PartitionName=wide Nodes=longview-w[1-200] State=UP
"""

_TOPOLOGY = """\
SwitchName=rack1 Nodes=longview-n1,longview-g[1-2],longview-w[1-100]
SwitchName=rack2 Nodes=longview-n2,longview-g[3-4],longview-w[101-200]
SwitchName=spine Switches=rack[1-2]
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """A running cluster."""

    folder: Path
    """Configuration, logs and state."""
    environment: dict[str, str]
    """What Slurm's commands need besides the usual environment, or in its place."""


def missing_programs() -> list[str]:
    """Slurm's programs that are not installed."""
    return [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]


def install() -> None:
    """Install Debian's packages, if a program is missing.

    Raises:
        RuntimeError: they cannot be installed; says why.
    """
    if not missing_programs() and shutil.which("debootstrap", path=_path()):
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise RuntimeError(f"slurm is not installed (no {', '.join(missing_programs())}): it takes root and apt-get")
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update"], ["install", "--yes", "--no-install-recommends", "slurm-wlm", "munge", "debootstrap"]):
        done = subprocess.run(["apt-get", "-q", *arguments], env=quiet, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"apt-get {' '.join(arguments)} failed: {done.stderr.strip()[-500:]}")


@contextmanager
def slurm_cluster(folder: Path, system: Path | None = None) -> Iterator[Cluster]:
    """Start a cluster in `folder`, a new or empty one; everything is stopped at the end of the block.

    `system` is a folder that holds another system (`tests.support.debian13`), whose Slurm then runs.

    Raises:
        RuntimeError: a program is missing, or the nodes are not idle after a minute; with the daemons' last words.
    """
    if missing_programs():
        raise RuntimeError(
            f"slurm is not installed (no {', '.join(missing_programs())}): python -m tests.support.slurm install"
        )
    if os.geteuid() != 0:
        raise RuntimeError("slurm's daemons need root")
    folder.mkdir(parents=True, exist_ok=True)
    environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
    if system is not None:
        # This version asks for control groups, which a container may not have.
        (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        _write_commands(folder / "bin", system)
        environment["PATH"] = f"{folder / 'bin'}:{environment['PATH']}"
    daemons: list[subprocess.Popen[bytes]] = []
    with _interrupted_by_sigterm():
        try:
            # Ports that are free stay so until the daemons listen there.
            with _no_other_starts():
                _write_configuration(folder)
                for command in _daemon_commands(folder, system):
                    # One by one: those already started are stopped if the next one cannot be.
                    daemons += [_start(command, folder, environment)]
                _wait_until_idle(folder, environment, daemons)
            yield Cluster(folder=folder, environment=environment)
        finally:
            # What a job runs outlives its node's daemon.
            _end_jobs(environment)
            for daemon in reversed(daemons):
                _stop(daemon)


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def _write_configuration(folder: Path) -> None:
    (folder / "state").mkdir()
    (folder / UNSHARED).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    controller_port = _free_ports(1 + len(NODES + GPU_NODES))
    for number in range(8):
        (folder / f"gpu{number}").touch()
    (folder / "topology.conf").write_text(_TOPOLOGY)
    (folder / "gres.conf").write_text(f"NodeName=longview-g[1-4] Name=gpu File={folder}/gpu[0-7]\n")
    memory_mib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20 // len(NODES)
    configuration = _CONFIG.format(
        host=socket.gethostname(),
        folder=folder,
        controller_port=controller_port,
        nodes="longview-n[1-2]",
        first_port=controller_port + 1,
        last_port=controller_port + len(NODES),
        gpu_nodes="longview-g[1-4]",
        first_gpu_port=controller_port + len(NODES) + 1,
        last_gpu_port=controller_port + len(NODES + GPU_NODES),
        memory_mib=memory_mib,
    )
    (folder / "slurm.conf").write_text(configuration)


def _free_ports(count: int) -> int:
    """The first of `count` neighbouring ports that nothing listens on at the moment."""
    for first in range(20000 + os.getpid() % 5000, 32000, count):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for offset, sock in enumerate(sockets):
                sock.bind(("", first + offset))
        except OSError:
            continue
        finally:
            for sock in sockets:
                sock.close()
        return first
    raise RuntimeError(f"no {count} neighbouring free ports")


def _write_commands(folder: Path, system: Path) -> None:
    """Slurm's commands as scripts, which run those of another system."""
    folder.mkdir()
    for name in COMMANDS:
        words = shlex.join([*_alone(debian13.mounts(system)), f"/usr/bin/{name}"])
        (folder / name).write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        (folder / name).chmod(0o755)


def _alone(mounts: list[str]) -> list[str]:
    """What comes before a command that sees other files than the rest of the machine."""
    return ["unshare", "--mount", "sh", "-ec", "\n".join([*mounts, 'exec "$@"']), "sh"] if mounts else []


def _daemon_commands(folder: Path, system: Path | None) -> list[list[str]]:
    munge_files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    munged = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge_files]
    mounts = debian13.mounts(system) if system else []
    # The last node sees another disk in the folder UNSHARED than the rest of the machine.
    of_last = [*mounts, f"mount -t tmpfs none '{folder}/{UNSHARED}'"]
    nodes = [
        [*_alone(of_last if node == NODES[-1] else mounts), "slurmd", "-D", "-N", node] for node in NODES + GPU_NODES
    ]
    return [[*_alone(mounts), *munged], [*_alone(mounts), "slurmctld", "-D"], *nodes]


@contextmanager
def _no_other_starts() -> Iterator[None]:
    """Have other clusters of this machine wait at this block until it ends."""
    with STARTS.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Have SIGTERM end the block as Ctrl-C does, by way of its `finally`."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end_jobs(environment: dict[str, str]) -> None:
    """Cancel what waits, kill what runs, and see it gone."""
    user = "--user=root"
    ask = ["squeue", "--noheader", "--states=running,completing", user]
    for command in (["scancel", "--state=pending", user], ["scancel", "--full", "--signal=KILL", user]):
        subprocess.run(command, env={**os.environ, **environment}, capture_output=True, check=False)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        left = subprocess.run(ask, env={**os.environ, **environment}, capture_output=True, check=False)
        if not left.stdout.strip():
            return
        time.sleep(0.2)


def _start(command: list[str], folder: Path, environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    with (folder / "daemons.output").open("ab") as output:
        return subprocess.Popen(
            # They end with this process, however it ends.
            ["setpriv", "--pdeathsig", "TERM", *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **environment},
            start_new_session=True,
        )


def _stop(daemon: "subprocess.Popen[bytes]") -> None:
    daemon.terminate()
    try:
        daemon.wait(timeout=10)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def _wait_until_idle(folder: Path, environment: dict[str, str], daemons: "list[subprocess.Popen[bytes]]") -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    command = ["sinfo", "--noheader", "--Node", f"--nodes={','.join(NODES + GPU_NODES)}", "--format=%N %T"]
    while True:
        sinfo = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
        if set(sinfo.stdout.splitlines()) == {f"{node} idle" for node in NODES + GPU_NODES}:
            return
        ended = [daemon.args for daemon in daemons if daemon.poll() is not None]
        if ended or time.monotonic() > deadline:
            words = "".join(
                path.read_text()[-1500:] for path in sorted([*folder.glob("*.output"), *folder.glob("*.log")])
            )
            raise RuntimeError(f"slurm did not start (ended: {ended}, sinfo: {sinfo.stdout}{sinfo.stderr})\n{words}")
        time.sleep(0.2)


def main(arguments: list[str]) -> None:
    """The two commands of the module's docstring."""
    if arguments == ["install"]:
        install()
        debian13.make()
    elif len(arguments) == 2 and arguments[0] == "run":
        with slurm_cluster(Path(arguments[1]).resolve()) as cluster:
            print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}", flush=True)
            try:
                signal.pause()
            except KeyboardInterrupt:
                print("stopping")
    else:
        sys.exit("usage: python -m tests.support.slurm install | run FOLDER")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RuntimeError as error:
        sys.exit(f"error: {error}")
