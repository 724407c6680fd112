"""What torch.compile adds: to the plain layer, to the fused one, and to a ranker's dense part around its layers.

Run on a GPU: python -m benchmarks.one_off.compilation [--json FILE]
On a CPU, to see that it runs: python -m benchmarks.one_off.compilation --small

Times are of a forward and a backward pass, bfloat16 on a GPU: medians on the device's clock.  The ranker (encoder, 6
layers, heads, loss) reads 16 made-up histories of 4,096 events and 8 candidates each; its tables are not in it.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import triton
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from attention_kernels import SemiLocalMask
from pipelines.config import DataConfig, SyntheticConfig
from pipelines.reading.loader import build_loader, dataset_info
from trainer.build import build_model
from trainer.config import TrainConfig
from trainer.models.config import ModelConfig, StageConfig
from trainer.models.hstu import HstuLayer, build_layer_spec
from trainer.models.layer import LayerBatch, plain_layer
from trainer.models.layer_config import LayerConfig
from trainer.models.layout import make_layout
from trainer.resolve import resolve

MASK = SemiLocalMask(local=256, global_rows=256)
STAGE = StageConfig(num_layers=6, local=256, global_rows=256)


def layer_steps(device: torch.device, *, small: bool) -> dict[str, Callable[[], Tensor]]:
    """Output of the plain and of the fused layer, summed; d 512, sequences of 16,384."""
    dim, tokens, length = (32, 256, 64) if small else (512, 131072, 16384)
    config = LayerConfig(num_heads=4, qk_dim=dim // 4, value_dim=dim // 4)
    layer = HstuLayer(dim=dim, spec=build_layer_spec(config, max_len=2**16)).to(device)
    host = torch.full((tokens // length,), length)
    none = torch.zeros_like(host)
    layout = make_layout(host.to(device), none.to(device), host, none)
    plan = layer.plan(layout, MASK)
    batch = LayerBatch(plan=plan)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x = torch.randn(tokens, dim, device=device, dtype=dtype)

    def plain() -> Tensor:
        return plain_layer(x, layer.parameter_set(), layer.spec, batch).sum()

    def fused() -> Tensor:
        out: Tensor = layer(x, plan)
        return out.sum()

    return {"plain layer": plain, "fused layer": fused}


def ranker_step(device: torch.device, *, small: bool) -> Callable[[], Tensor]:
    """Loss of a ranker's dense part on one batch of looked-up rows."""
    dim, length, samples = (32, 64, 4) if small else (512, 4096, 16)
    layer = LayerConfig(num_heads=4, qk_dim=dim // 4, value_dim=dim // 4)
    config = TrainConfig(
        name="compilation",
        data=DataConfig(
            path="synthetic",
            global_batch_size=samples,
            max_history_len=length,
            reader_threads=0,
            synthetic=SyntheticConfig(num_users=samples, lengths="constant", max_len=length),
        ),
        model=ModelConfig(dim=dim, max_len=length + 64, layer=layer, stages=(STAGE,)),
        embedding_dim=dim // 2,
    )
    resolved = resolve(config, dataset_info(config.data))
    model = build_model(resolved, device)
    loader = build_loader(config.data, split="train", rank=0, world_size=1, selection=resolved.task.selection)
    batch = next(iter(loader)).to(device)
    looked_up = {
        key: JaggedTensor(
            values=torch.randn(jagged.values().numel(), dim // 2, device=device), lengths=jagged.lengths()
        )
        for key, jagged in batch.inputs.features.to_dict().items()
    }

    def step() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss: Tensor = model.loss(model.tower([looked_up], batch.inputs), [looked_up], batch)
        return loss

    return step


def milliseconds(step: Callable[[], Tensor], device: torch.device) -> float:
    """Median of a forward and a backward pass, the first ones (compilation) left out."""

    def run() -> None:
        step().backward()  # type: ignore[no-untyped-call]  # torch's method

    for _ in range(3):
        run()
    if device.type == "cuda":
        return float(triton.testing.do_bench(run, warmup=20, rep=200, return_mode="median"))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def main() -> None:
    """Prints eager and compiled times, graph breaks and seconds of compilation; writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    steps = {**layer_steps(device, small=arguments.small), "ranker": ranker_step(device, small=arguments.small)}
    rows: dict[str, Any] = {}
    for name, step in steps.items():
        row: dict[str, Any] = {"eager_ms": milliseconds(step, device)}
        torch._dynamo.reset()
        try:
            with warnings.catch_warnings():
                # Dynamo's own, about what one graph hands to the next.
                warnings.simplefilter("ignore")
                row["graph_breaks"] = torch._dynamo.explain(step)().graph_break_count
                torch._dynamo.reset()
                start = time.perf_counter()
                compiled = torch.compile(step)
                compiled().backward()  # type: ignore[no-untyped-call]  # torch's method
                row["compile_s"] = time.perf_counter() - start
                row["compiled_ms"] = milliseconds(compiled, device)
        except (RuntimeError, NotImplementedError) as error:
            # What does not compile is a result of this table.
            row["failed"] = f"{error!r:.300}"
        rows[name] = row
        print(name, json.dumps(row), flush=True)
    if arguments.json:
        name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        arguments.json.write_text(json.dumps({"device": name, "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
