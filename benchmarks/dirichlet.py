"""SiLU against softmax attention on a synthetic stream with a growing vocabulary (HSTU paper, section 4.1.1).

Run (a GPU takes about a minute): python -m benchmarks.dirichlet [--json FILE] [--records N] [--seeds N]

Items belong to categories.  A record draws a concentration a ~ U(1, 500) and up to five categories; event i takes a new
category of these with probability a / (a + i), otherwise the category of an earlier event at random, so that counts
decide; then an available item of the category at random.  40% of the items exist at the start, the others appear one
after another as the stream goes on.  Models see the first 90% of the stream once, in order, and rank all items for the
last event of records of the remaining 10%.

Both models are the same layers with the same initial values; one divides SiLU scores by a constant, the other takes a
softmax.  The design (11.3) prints HR@10 .0893 against .0617, with 1M records.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention_kernels import SemiLocalMask, layer_reference
from trainer.models.hstu import HstuLayer, HstuTower, Stage
from trainer.models.layer import LayerSpec
from trainer.models.layout import SequenceLayout
from trainer.models.precision import compute_dtype
from trainer.models.retriever import Retriever, retrieval_metrics

NUM_ITEMS, NUM_CATEGORIES, LENGTH, MAX_CATEGORIES = 20000, 100, 128, 5
FIRST_SHARE, TRAIN_SHARE = 0.4, 0.9
DIM, LAYERS, HEADS = 128, 2, 2
BATCH, LEARNING_RATE = 512, 2e-3


def stream(records: int, seed: int, device: torch.device) -> Tensor:
    """[records, LENGTH] item ids."""
    generator = torch.Generator(device).manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    own = uniform(records, NUM_CATEGORIES).argsort(1)[:, :MAX_CATEGORIES]
    num_own = (uniform(records) * MAX_CATEGORIES).long() + 1
    concentration = 1 + 499 * uniform(records)
    chosen = torch.zeros(records, LENGTH, dtype=torch.long, device=device)
    for i in range(LENGTH):
        fresh = own.gather(1, (uniform(records) * num_own).long()[:, None])[:, 0]
        earlier = chosen.gather(1, (uniform(records) * max(1, i)).long()[:, None])[:, 0]
        is_new = uniform(records) < concentration / (concentration + i)
        chosen[:, i] = torch.where(is_new, fresh, earlier)
    # Item c + NUM_CATEGORIES * k is the k-th of category c, and appears in the order of k.
    progress = torch.arange(records, device=device) / records
    per_category = NUM_ITEMS // NUM_CATEGORIES
    available = (per_category * (FIRST_SHARE + (1 - FIRST_SHARE) * progress)).long().clamp(1, per_category)
    order = (uniform(records, LENGTH) * available[:, None]).long()
    return chosen + NUM_CATEGORIES * order


class SoftmaxTower(nn.Module):
    """The layers of an HstuTower with causal softmax attention; sequences of one length."""

    def __init__(self, tower: HstuTower) -> None:
        super().__init__()
        self.layers = tower.layers

    def forward(self, x_TD: Tensor, layout: SequenceLayout) -> tuple[Tensor, SequenceLayout]:
        """As `HstuTower.forward`."""
        x_TD = x_TD.to(compute_dtype(x_TD))
        for layer in self.layers:
            assert isinstance(layer, HstuLayer)
            x_TD = self._layer(layer, x_TD, layout.num_users)
        return x_TD, layout

    def _layer(self, layer: HstuLayer, x_TD: Tensor, users: int) -> Tensor:
        p, spec = layer.parameter_set(), layer.spec
        normed = layer_reference.layer_norm(x_TD, p.input_norm_weight, p.input_norm_bias, spec.norm_eps)
        uvqk = F.silu(torch.addmm(p.uvqk_bias.to(x_TD.dtype), normed, p.uvqk_weight.to(x_TD.dtype)))
        heads = spec.split_heads(uvqk[:, spec.gate_width :])
        q, k, v = (part.view(users, -1, *part.shape[1:]).transpose(1, 2) for part in heads)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        gated = layer_reference.gated_norm(
            attended.transpose(1, 2).flatten(0, 1).flatten(1),
            uvqk[:, : spec.gate_width],
            p.output_norm_weight,
            p.output_norm_bias,
            spec.norm_eps,
        )
        return torch.addmm(x_TD, gated, p.output_weight.to(x_TD.dtype))


def make_model(*, softmax: bool, device: torch.device) -> Retriever:
    """The retriever; its initial values do not depend on the kind of attention."""
    torch.manual_seed(0)
    spec = LayerSpec(num_heads=HEADS, qk_dim=DIM // HEADS, value_dim=DIM // HEADS, max_len=LENGTH)
    layers = [HstuLayer(dim=DIM, spec=spec) for _ in range(LAYERS)]
    tower = HstuTower(layers, [Stage(num_layers=LAYERS, mask=SemiLocalMask())])
    return Retriever(
        num_items=NUM_ITEMS,
        dim=DIM,
        tower=SoftmaxTower(tower) if softmax else tower,
        num_positions=LENGTH,
        num_negatives=512,
        temperature=0.05,
    ).to(device)


def train_and_score(data: Tensor, *, softmax: bool) -> dict[str, float]:
    """One pass over the first part of `data`, then ranks on the last."""
    device = data.device
    model = make_model(softmax=softmax, device=device)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=device.type == "cuda")
    split = int(TRAIN_SHARE * data.shape[0]) // BATCH * BATCH
    start = time.perf_counter()
    for batch in torch.split(data[:split], BATCH):
        lens_host = torch.full((batch.shape[0],), LENGTH)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(batch.flatten(), lens_host.to(device), lens_host)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ranks = []
    model.eval()
    for batch in torch.split(data[split:], 1024):
        lens_host = torch.full((batch.shape[0],), LENGTH - 1)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            ranks.append(model.ranks(batch[:, :-1].flatten(), lens_host.to(device), lens_host, batch[:, -1]))
    metrics = retrieval_metrics(torch.cat(ranks))
    return {
        "hr@10": metrics.hit_rates[10],
        "hr@50": metrics.hit_rates[50],
        "ndcg@10": metrics.ndcg[10],
        "final_loss": float(loss.detach()),
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    """Trains both models on each seed's stream, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--records", type=int, default=600_000)
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        data = stream(arguments.records, seed, device)
        for softmax in (False, True):
            row = {
                "attention": "softmax" if softmax else "silu",
                "seed": seed,
                **train_and_score(data, softmax=softmax),
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"records": arguments.records, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
