"""What a job asks a scheduler for on each node: a whole machine of `embeddings/hardware.py`, or a core a process."""

from torchx.specs import Resource

from embeddings.hardware import node_type


def requested(machine: str | None, *, procs_per_node: int) -> Resource:
    """The request of a job on nodes of a machine type or of a .json file that describes one, in TorchX's terms.

    TorchX counts memory in MB of 2^20 bytes, -1 where nothing is asked for.  Without a machine a job asks for a core a
    process, no GPU and the scheduler's default memory.

    Raises:
        ValueError: no such type, a wrong file, or too many processes: there is room for one a GPU, or one a core.
    """
    if machine is None:
        return Resource(cpu=procs_per_node, gpu=0, memMB=-1)
    node = node_type(machine)
    if not node.cpus:
        raise ValueError(f"machine {machine} does not say how many cores it has, which a job asks for: add its cpus")
    slots, unit = (node.gpus, "GPUs") if node.gpus else (node.cpus, "cores")
    if procs_per_node > slots:
        raise ValueError(
            f"--procs-per-node {procs_per_node} on machine {machine}, which has {slots} {unit}: "
            f"ask for at most {slots}, or for another --machine"
        )
    return Resource(cpu=node.cpus, gpu=node.gpus, memMB=node.host_mib)
