"""A job that takes seconds: every process joins, adds up the ranks and writes what it saw.

python -m tests.launch.tiny_job FOLDER [RANK_THAT_FAILS]
"""

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist


def main(folder: Path, failing_rank: int) -> None:
    """Join the job, all-reduce, write FOLDER/rank-N; `failing_rank` logs an error and fails the first time."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    total = torch.tensor(float(rank))
    dist.all_reduce(total)
    restarted = (folder / f"rank-{rank}").exists()
    (folder / f"rank-{rank}").write_text(f"{dist.get_world_size()} {total.item():.0f}")
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    (logs / f"rank-{rank}.log").write_text(f"{_now()} INFO trainer: started\n")
    dist.barrier()
    print(f"rank {rank} is here", flush=True)
    dist.destroy_process_group()
    if rank == failing_rank and not restarted:
        with (logs / f"rank-{rank}.log").open("a") as log:
            log.write(f"{_now()} ERROR trainer: out of luck\n")
        sys.exit(1)


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S,000")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else -1)
