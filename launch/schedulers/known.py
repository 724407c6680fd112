"""All schedulers, by name."""

from collections.abc import Callable

from launch.schedulers.docker import Docker
from launch.schedulers.kubernetes import Kubernetes
from launch.schedulers.local import Local
from launch.schedulers.protocol import Scheduler
from launch.schedulers.slurm import Slurm

SCHEDULERS: dict[str, Callable[[str], Scheduler]] = {
    "local_cwd": Local,
    "slurm": Slurm,
    "kubernetes": Kubernetes,
    "local_docker": Docker,
}
"""By name: what makes one, of the name of TorchX's session."""
