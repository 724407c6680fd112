"""Every rank of a job must have begun with the same command, and must read the same data.

Where no launcher of ours starts the ranks, a command is typed on each node, and data may lie on each node's own disk.
Ranks that differ would train together to the end, and nothing would tell.
"""

import hashlib
import json
import socket
from collections.abc import Iterator, Mapping
from typing import Any

import torch.distributed as dist

from trainer.parallel.mesh import Mesh
from trainer.resolve import Resolved
from trainer.typed_values import differences, to_dict

OWN = ("data.path", "data.mix_paths", "data.reader_threads", "data.prefetch_batches")
"""Settings that each node may have of its own: what is read is compared."""


def check_alike(mesh: Mesh, told: Mapping[str, Any], resolved: Resolved, **contents: str) -> None:
    """Compare what this rank was told with what the first one was: its configuration and what else is `told`, by name,
    the data's description, and the `contents` of its splits (`Source.contents`).  Called by every rank.

    Raises, on every rank alike:
        ValueError: naming the first rank that differs, and in what.
    """
    host, path = socket.gethostname(), resolved.config.data.path
    described = hashlib.sha256(json.dumps(resolved.info.as_dict(), sort_keys=True).encode()).hexdigest()
    read = {"dataset.json": described, **{f"{split} split": digest for split, digest in contents.items()}}
    mine = (host, {**to_dict(resolved.config), **told}, read)
    of_first: list[Any] = [mine]
    dist.broadcast_object_list(of_first, 0)  # every rank
    found = next(_differences(mine, of_first[0], path), None)
    problems: list[str | None] = [None] * mesh.world_size
    dist.all_gather_object(problems, found and f"rank {mesh.rank} on {host} {found}")  # every rank
    for problem in problems:
        if problem is not None:
            raise ValueError(problem)


_Told = tuple[str, dict[str, Any], dict[str, str]]
"""A rank's host, what it was told, and digests of what it reads."""


def _differences(mine: _Told, first: _Told, path: str) -> Iterator[str]:
    for key, old, new in differences(first[1], mine[1]):
        if key not in OWN:
            yield f"was started with {key}={new}, rank 0 on {first[0]} with {old}: give every rank the same command"
    for what, digest in mine[2].items():
        if digest != first[2][what]:
            yield (
                f"reads another {what} in {path} than rank 0 on {first[0]}: it is being extended just now, or not the "
                "same folder on all nodes; copy the same data set to each, or let them share one, and start again"
            )
