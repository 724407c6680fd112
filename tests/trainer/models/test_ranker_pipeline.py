"""The ranker through TorchRec's pipeline, which traces it up to the tables."""

import pytest
import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from pipelines.batches.batch import Batch
from tests.support.batches import random_batch
from tests.support.distributed import run_ranks
from tests.trainer.models.test_ranker import CONTEXT, model_config, small_ranker


def pipelined_and_plain_losses() -> tuple[list[float], list[float]]:
    """Losses of three steps through TorchRec's pipeline and through the plain model with the same values."""
    batches = [random_batch([5, 2], [2, 1], context_names=CONTEXT, seed=seed) for seed in range(3)]
    sharded = DistributedModelParallel(small_ranker(model_config()), device=torch.device("cpu"))
    plain = small_ranker(model_config())
    for name, parameter in sharded.named_parameters():
        source = plain.state_dict()[name.replace("module.", "")]
        local = parameter.local_shards()[0].tensor if hasattr(parameter, "local_shards") else parameter
        local.detach().copy_(source)
    optimizer = torch.optim.SGD([p for n, p in sharded.named_parameters() if "tables" not in n], lr=0.1)

    def forward(batch: Batch) -> tuple[Tensor, Tensor]:
        loss: Tensor = sharded(batch)
        return loss, loss.detach()

    pipeline = TrainPipelineSparseDist(
        sharded, optimizer, torch.device("cpu"), execute_all_batches=True, custom_model_fwd=forward
    )
    iterator = iter(batches)
    pipelined: list[float] = []
    try:
        while True:
            pipelined.append(float(pipeline.progress(iterator)))
    except StopIteration:
        pass
    # The sharded tables' own optimizer, fused into the backward, is SGD with this rate unless told otherwise.
    tables = {"params": list(plain.tables.parameters()), "lr": 0.01}
    plain_optimizer = torch.optim.SGD([tables, {"params": list(plain.tower.parameters())}], lr=0.1)
    losses = []
    for batch in batches:
        plain_optimizer.zero_grad()
        loss = plain(batch)
        loss.backward()
        plain_optimizer.step()
        losses.append(float(loss.detach()))
    return pipelined, losses


@pytest.mark.filterwarnings("ignore")  # TorchRec and FBGEMM warn about types of their own
def test_torchrecs_pipeline_runs_the_ranker() -> None:
    ((pipelined, plain),) = run_ranks(1, pipelined_and_plain_losses)
    assert pipelined == pytest.approx(plain, rel=1e-4, abs=1e-5)
