"""Training steps on one long history: on one rank, or shared by all ranks of the job.

Run: python -m benchmarks.context_parallel [--json FILE] [--small]; torchrun --nproc-per-node N -m
benchmarks.context_parallel

Eight layers of width 512 with 4 heads of 128, full causal and semi-local (256 + 256), one history a step.  A row tells
the median step and the peak memory of a rank.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.measured_on import measured_on
from benchmarks.step import Case, measure
from pipelines.config import DataConfig, SyntheticConfig
from trainer.config import TrainConfig
from trainer.models.config import ModelConfig, StageConfig
from trainer.models.layer_config import LayerConfig
from trainer.parallel.mesh import discover_mesh, joined


def main() -> None:
    parser = argparse.ArgumentParser(description="Time steps on long histories that ranks share.")
    parser.add_argument("--json", type=Path, default=None, help="write the figures to this file")
    parser.add_argument("--small", action="store_true", help="short histories, narrow models")
    arguments = parser.parse_args()
    mesh = discover_mesh()
    mesh, rows = replace(mesh, sharing=mesh.world_size), {}
    with joined(mesh):
        for events in (96, 192) if arguments.small else (65_536, 131_072):
            for name, stage in (("full causal", {}), ("semi-local", {"local": 256, "global_rows": 256})):
                case = make_case(events, StageConfig(num_layers=8, **stage), mesh.sharing, small=arguments.small)
                rows[f"{name}, {events} events"] = row = measure(case, mesh, steps=5)
                if mesh.is_first:
                    print(name, events, json.dumps({key: round(value, 3) for key, value in row.items()}), flush=True)
    if arguments.json is not None and mesh.is_first:
        where = {**measured_on(), "ranks": mesh.world_size}
        arguments.json.write_text(json.dumps({"hardware": where, "rows": rows}, indent=1) + "\n")


def make_case(events: int, stage: StageConfig, sharing: int, *, small: bool) -> Case:
    """One history of so many events."""
    head = 8 if small else 128
    layer = LayerConfig(num_heads=4, qk_dim=head, value_dim=head)
    model = ModelConfig(dim=4 * head, max_len=events + 64, layer=layer, stages=(stage,))
    data = DataConfig(
        path="synthetic",
        global_batch_size=1,
        max_history_len=events,
        synthetic=SyntheticConfig(num_items=1000 if small else 1_000_000),
    )
    config = TrainConfig(name="long", data=data, model=model, embedding_dim=4 * head, context_parallel=sharing)
    return Case(config, np.full(1, events))


if __name__ == "__main__":
    main()
