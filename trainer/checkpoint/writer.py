"""The process that writes staged state: `python -m trainer.checkpoint.writer FD BYTES`, one a rank.

Requests come as JSON lines, to fold rows into the state or to write a part of the memory; replies go likewise.  A
process, because writing and checksums beside the training must not hold its interpreter.  No torch: it starts in a
moment.  It ends with its rank, however that ends.
"""

import json
import mmap
import os
import sys
from collections.abc import Iterator
from queue import SimpleQueue
from threading import Thread
from typing import Any

from trainer.checkpoint.chunks import CHUNK_BYTES, write_chunks
from trainer.checkpoint.folding import Move, fold
from trainer.checkpoint.store import open_store


def main(descriptor: int, num_bytes: int) -> None:
    """Serve requests until the rank is gone."""
    memory = mmap.mmap(descriptor, max(1, num_bytes))
    requests: SimpleQueue[dict[str, Any]] = SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            requests.put(json.loads(line))
        # The rank has gone: what is half written would be of no use, and could meet its successor's files.
        os._exit(1)

    Thread(target=listen, daemon=True).start()
    while True:
        print(json.dumps(_serve(memoryview(memory), requests.get())), flush=True)


def _serve(memory: memoryview, request: dict[str, Any]) -> dict[str, Any]:
    if "moves" in request:
        for move in request["moves"]:
            fold(memory, Move(**move))
        return {}
    start, end = request["start"], request["start"] + request["bytes"]
    try:
        with open_store(request["store"]).writing(request["path"]) as file:
            record = write_chunks(file, _blocks(memory[start:end]))
    except OSError as error:
        return {"error": str(error)}
    return {"bytes": record.num_bytes, "crc32": record.crc32}


def _blocks(memory: memoryview) -> Iterator[memoryview]:
    for start in range(0, len(memory), CHUNK_BYTES):
        yield memory[start : start + CHUNK_BYTES]


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
