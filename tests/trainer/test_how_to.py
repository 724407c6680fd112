"""CONTRIBUTING's "How to add" a feature, a table, a label kind, a head, a metric and a task, followed here."""

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embeddings.tables import build_tables
from pipelines.features import DatasetInfo, parse_dataset_info
from tests.support.batches import random_batch
from tests.support.datasets import made_up_info
from tests.trainer.labels.test_kinds import NUMBERS, info
from tests.trainer.models.test_retriever import NEGATIVES, batch_of, config, small
from trainer import resolve
from trainer.config import TableSettings
from trainer.labels import build
from trainer.labels.config import LabelConfig
from trainer.labels.kind import LabelKind
from trainer.labels.loss import build_ranking_loss
from trainer.labels.measure import LabelMetrics
from trainer.models.flops import retriever_flops
from trainer.models.heads import build as heads
from trainer.models.heads.rank_head import RankHead
from trainer.models.heads.similarity import Similarity
from trainer.recipes import load_recipe


def test_a_feature_is_a_column_and_its_table_a_setting() -> None:
    """What is read, and its table, follow from the description of the data; a width of its own is a word."""
    values = made_up_info(num_items=9, actions=("click",), numbers=("dwell_s",)).as_dict()
    values["spaces"]["brand"] = {"rows": 5}
    values["item"] = {"brand": "brand", "kinds": ["brand"]}
    data = parse_dataset_info(values, "made up")
    recipe = load_recipe("own_log")
    stated = replace(recipe, tables={"brand": TableSettings(embedding_dim=4)})
    found = resolve.resolve(stated, data)
    tables = {table.name: table for table in found.tables}
    assert set(tables["brand"].features) == {"item.brand", "item.kinds"}
    assert (tables["brand"].embedding_dim, tables["item"].embedding_dim) == (4, recipe.embedding_dim)
    assert found.task.build(build_tables(found.tables, device=torch.device("meta"))).tower is not None
    with pytest.raises(ValueError, match=r"tables names 'colour', which is none of the model's tables"):
        resolve.resolve(replace(recipe, tables={"colour": TableSettings(embedding_dim=4)}), data)


class Count(LabelKind):
    """A count, by its Poisson likelihood; its metric is new too."""

    num_outputs = 1
    metrics = ("largest_error",)

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def targets(self, labels: Any) -> Tensor:
        return labels.values[self.name]  # type: ignore[no-any-return]

    def start(self) -> Tensor:
        return torch.tensor([2.0])

    def loss(self, outputs_CK: Tensor, targets_C: Tensor) -> Tensor:
        losses = F.poisson_nll_loss(outputs_CK[:, 0], targets_C.nan_to_num().float(), reduction="none")
        return losses * ~targets_C.isnan()

    def predict(self, outputs_CK: Tensor) -> Tensor:
        return outputs_CK[:, 0].double().exp()

    def evidence(self, outputs_CK: Tensor, targets_C: Tensor) -> Tensor:
        return torch.stack([self.predict(outputs_CK), targets_C.double()], dim=1)

    def measure(self, evidence: Tensor, weights_C: Tensor, user_ids_C: Tensor) -> dict[str, float]:
        return {"largest_error": float((evidence[:, 0] - evidence[:, 1]).abs().max())}


def build_count(config: LabelConfig, info: DatasetInfo) -> LabelKind:
    return Count(config.name)


def test_a_label_kind_and_its_metric_are_one_module_and_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(build.BUILD, "count", build_count)
    kind: Any = "count"
    loss = build_ranking_loss((LabelConfig(name="click"), LabelConfig(name="dwell", kind=kind)), info())
    assert loss.num_outputs == 2 and loss.start()[1] == 2.0
    outputs = torch.zeros(4, 2, requires_grad=True)
    labels = SimpleNamespace(action=NUMBERS.action, values=NUMBERS.values, loss_denominator=torch.tensor(4.0))
    loss(outputs, None, SimpleNamespace(inputs=SimpleNamespace(padded=False), labels=labels)).backward()
    assert outputs.grad is not None and outputs.grad[:, 1].tolist() != [0.0] * 4
    metrics = LabelMetrics(loss.kinds, torch.device("cpu"))
    metrics.update(*loss.evidence(outputs.detach(), labels), torch.arange(4))
    found = metrics.compute()
    assert found["largest_error/dwell"] == pytest.approx(98.0) and "auc/click" in found


class Distance(Similarity):
    """Minus the squared distance."""

    def queries(self, outputs_PE: Tensor) -> Tensor:
        return outputs_PE.float()

    def items(self, rows_NE: Tensor) -> Tensor:
        return rows_NE.float()

    def forward(self, queries: Tensor, items: Tensor) -> Tensor:
        pairs = items if items.dim() == 3 else items[None]
        return -(queries[:, None] - pairs).square().sum(2)


@dataclass(frozen=True, kw_only=True, slots=True)
class DistanceConfig:
    """Its settings, and its FLOPs."""

    kind: Literal["distance"] = "distance"

    def query_flops(self, embedding_dim: int) -> int:
        return 0

    def item_flops(self, embedding_dim: int) -> int:
        return 0

    def pair_flops(self, embedding_dim: int) -> int:
        return 3 * embedding_dim


@pytest.mark.parametrize("share", [True, False])
def test_a_head_that_scores_items_is_one_module_its_settings_and_one_entry(
    share: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(heads.SIMILARITIES, DistanceConfig, lambda config, *, embedding_dim: Distance())
    usual = config(share=share)
    assert usual.retrieval is not None
    similarity: Any = DistanceConfig()
    other = replace(usual, retrieval=replace(usual.retrieval, similarity=similarity))
    model = small(other)
    assert isinstance(model.tower.similarity, Distance)
    model(batch_of(share=share)).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    costs = [retriever_flops(each, 5, embedding_dim=12, num_items=40).forward for each in (other, usual)]
    assert costs[0] - costs[1] == 4 * (NEGATIVES + 1) * 12


class Plain(RankHead):
    """One linear map."""

    def __init__(self, dim: int, num_outputs: int) -> None:
        super().__init__()
        self.output = nn.Linear(dim, num_outputs)

    def forward(self, hidden_CD: Tensor) -> Tensor:
        return self.output(hidden_CD.float())  # type: ignore[no-any-return]

    @torch.no_grad()
    def start_at(self, outputs_K: Tensor, *, alike: bool) -> None:
        self.output.bias.copy_(outputs_K)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlainConfig:
    """Its settings, and its FLOPs."""

    kind: Literal["plain"] = "plain"

    def flops(self, dim: int, num_outputs: int) -> int:
        return 2 * dim * num_outputs


def test_a_rankers_head_is_one_module_its_settings_and_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        heads.RANK_HEADS, PlainConfig, lambda config, *, dim, num_outputs: Plain(dim=dim, num_outputs=num_outputs)
    )
    recipe = load_recipe("kuairand_sample")
    head: Any = PlainConfig()
    found = resolve.resolve(replace(recipe, model=replace(recipe.model, head=head)), info())
    model = found.task.build(build_tables(found.tables, device=torch.device("meta")))
    assert isinstance(model.tower.head, Plain)
    assert found.task.flops(9, 2).forward == resolve.resolve(recipe, info()).task.flops(9, 2).forward


def test_a_task_is_one_object_and_one_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that ranks as usual, but on half of the history: nothing else asks which task a run has."""
    shop, recipe = info(), load_recipe("kuairand_sample")
    usual = resolve.make_task(recipe, shop)

    class Renamed:
        def __getattr__(self, name: str) -> Any:
            return getattr(usual, name)

        def prepare(self, batch: Any, mesh: Any) -> Any:
            return ("made up", batch)

    monkeypatch.setattr(resolve, "make_task", lambda config, info: Renamed())
    resolved = resolve.resolve(recipe, shop)
    batch, mesh = random_batch([2], [1]), SimpleNamespace()
    assert resolved.task.prepare(batch, mesh) == ("made up", batch)
    assert resolved.tables == usual.tables
