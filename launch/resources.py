"""Named machine types: what a job asks a scheduler for on each node.

A job takes whole machines, as sharded training does, so a type is one machine's size.  Add your cluster's types to
MACHINES; sizes are what the scheduler may hand out, a little below what the vendor prints on the box.
"""

from dataclasses import dataclass

from torchx.specs import Resource


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """One node's size."""

    name: str
    """What `--machine` takes."""
    cpus: int
    """CPU cores a node."""
    memory_mib: int
    """Main memory a node, in MiB; 0: what the scheduler gives a job that does not say."""
    gpus: int
    """NVIDIA GPUs a node."""

    def resource(self) -> Resource:
        """The request in TorchX's terms, which counts memory in MB of 2^20 bytes, -1 where unsaid."""
        return Resource(cpu=self.cpus, gpu=self.gpus, memMB=self.memory_mib or -1)


_ALL = (
    Machine(name="cpu-2", cpus=2, memory_mib=7_000, gpus=0),
    Machine(name="cpu-16", cpus=16, memory_mib=60_000, gpus=0),
    Machine(name="cpu-64", cpus=64, memory_mib=240_000, gpus=0),
    Machine(name="h100-8", cpus=184, memory_mib=1_900_000, gpus=8),
    Machine(name="h200-1", cpus=16, memory_mib=120_000, gpus=1),
    Machine(name="h200-8", cpus=184, memory_mib=1_900_000, gpus=8),
    Machine(name="a100-8", cpus=92, memory_mib=1_000_000, gpus=8),
)

MACHINES = {machine.name: machine for machine in _ALL}


def machine_named(name: str, *, procs_per_node: int) -> Machine:
    """The machine type `name`, after checking that `procs_per_node` processes fit: one a GPU, or one a core.

    Raises:
        ValueError: no such type, or too many processes for it.
    """
    if name not in MACHINES:
        raise ValueError(f"unknown machine {name!r}: known are {', '.join(sorted(MACHINES))} (launch/resources.py)")
    machine = MACHINES[name]
    slots, unit = (machine.gpus, "GPUs") if machine.gpus else (machine.cpus, "cores")
    if procs_per_node > slots:
        raise ValueError(
            f"--procs-per-node {procs_per_node} on machine {name}, which has {slots} {unit}: "
            f"ask for at most {slots}, or for another --machine"
        )
    return machine
