"""What a step of sharded tables takes on the ranks of a job, however they are cut and rows travel, beside its plan.

Run: torchrun --nproc-per-node 2 -m benchmarks.exchange_time [--machine MACHINE.json] [--ids 262144] [--json FILE]

MACHINE.json is what `python -m embeddings probe` wrote on as many ranks.  Lookup, exchange of rows, backward pass and
update, each rank with ids of its own; ids travel before, as in training.
"""

import argparse
import gc
import json
from pathlib import Path

from benchmarks.exchange import WAYS
from benchmarks.measured_on import measured_on
from embeddings.config import ExchangeConfig, PlacementConfig, TableConfig
from embeddings.measuring.trial import Trial, median_ms
from trainer.build import machine_of
from trainer.parallel.mesh import discover_mesh, joined

ROWS = {"4M rows": 4_000_000, "20K rows": 20_000}
"""Rows of a table whose ids are nearly all distinct, and of one in which they repeat."""
KINDS = ("row_wise", "table_wise")
COLUMNS = 128


def main() -> None:
    """Prints and writes a row a way."""
    parser = argparse.ArgumentParser(description="Time of sharded tables on several ranks, measured and planned.")
    parser.add_argument("--machine", help="a machine's file, for its rates")
    parser.add_argument("--ids", type=int, default=2**18, help="of each rank, in a step")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/exchange_time.json"))
    arguments = parser.parse_args()
    ways = WAYS | {"bfloat16 rows and gradients": ExchangeConfig(rows="bfloat16", gradients="bfloat16")}
    mesh, found = discover_mesh(), {}
    with joined(mesh):
        machine = machine_of(mesh, arguments.machine)
        for rows, count in ROWS.items():
            # Two tables, so that with whole ones two ranks have work.
            tables = [
                TableConfig(name=name, num_embeddings=count, embedding_dim=COLUMNS, features=(name,))
                for name in ("a", "b")
            ]
            for kind in KINDS:
                for way, exchange in ways.items():
                    placement = PlacementConfig(sharding_types=(kind,), exchange=exchange)
                    trial = Trial(tables, arguments.ids // 2, machine=machine, placement=placement, rank=mesh.rank)
                    took, planned = median_ms(trial.step, mesh.device, prepare=trial.exchange), trial.plan.step_ms
                    found[f"{rows}, {kind}, {way}"] = {"measured_ms": took, "planned_ms": planned}
                    del trial
                    gc.collect()
                    if mesh.is_first:
                        print(f"{rows:>9} {kind:>11} {way:<48} {took:8.3f} ms, planned {planned:8.3f}", flush=True)
                        where = measured_on() | {"ranks": mesh.world_size, "machine": machine.calibration}
                        text = json.dumps({"hardware": where, "ids": arguments.ids, "ways": found}, indent=1)
                        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
