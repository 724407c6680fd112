"""Two heads on one trunk: the sum of two losses that know nothing of each other, and no leak from what comes later."""

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from embeddings.tables import build_tables, init_tables, rows_by_feature
from pipelines.batches.batch import Batch
from pipelines.features import DatasetInfo, SplitInfo
from tests.support.batches import NUM_ITEMS, batch_of, random_arrays
from tests.support.datasets import made_up_info
from trainer.config import TrainConfig
from trainer.models.config import ChannelConfig, InputConfig, StageConfig
from trainer.models.heads.config import MixtureOfLogitsConfig
from trainer.models.joint import next_rows
from trainer.models.layer_config import LayerConfig
from trainer.models.model import Model
from trainer.models.negatives import NEGATIVE_FEATURE
from trainer.models.relative_config import RelativeBiasConfig
from trainer.models.retrieval_config import RetrievalConfig
from trainer.recipes import load_recipe
from trainer.resolve import Resolved, resolve
from trainer.tasks.joint import predict

HISTORY, CANDIDATES = [3, 1, 0, 5, 2], [1, 0, 2, 3, 0]
NEXT = [1, 2, 11, -1, 5, 6, 7, 8, 14, 10, -1]
"""What follows each event, among 11 events and then 6 candidates."""
WEIGHT, TEMPERATURE, NEGATIVES = 0.3, 0.1, 20
ACTIONS = tuple(f"action_{index}" for index in range(8))


def info() -> DatasetInfo:
    return made_up_info(num_items=NUM_ITEMS, context={"country": 7}, actions=ACTIONS)


def config(merge: Literal["add", "interleave"] = "add", **retrieval: Any) -> TrainConfig:
    recipe = load_recipe("kuairand_joint")
    head = {"num_negatives": NEGATIVES, "beside_ranking": WEIGHT, "temperature": TEMPERATURE} | retrieval
    return replace(
        recipe,
        model=replace(
            recipe.model,
            dim=16,
            layer=LayerConfig(num_heads=2, qk_dim=8, value_dim=8),
            stages=(StageConfig(num_layers=2, local=2, global_columns=1),),
            input=InputConfig(num_positions=8, num_time_buckets=8, causal=True, merge=merge),
            retrieval=RetrievalConfig(**head),
        ),
        embedding_dim=12,
    )


def built(resolved: Resolved) -> Model:
    """With parameters that say something: rows are not all alike, and the labels' head not zero."""
    tables = build_tables(resolved.tables, device=torch.device("cpu"))
    init_tables(tables, seed=0)
    torch.manual_seed(0)
    model = resolved.task.build(tables)
    for parameter in model.tower.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def batch(history: list[int] = HISTORY, candidates: list[int] = CANDIDATES, **changes: Tensor) -> Batch:
    arrays = random_arrays(history, candidates, context_names=("user_id", "country"), seed=3)
    arrays["timestamp"] = 1_700_000_000 + torch.arange(len(arrays["timestamp"])) * 7
    arrays |= changes
    arrays[f"ids/{NEGATIVE_FEATURE}"] = arrays["drawn"] = torch.arange(NEGATIVES) * 2
    ids, following = iter(arrays["ids/item_id"].tolist()), []
    events = [[next(ids) for _ in range(count)] for count in history]
    for own, count in zip(events, candidates, strict=True):
        first = [next(ids) for _ in range(count)][:1] or [-1]
        following += [*own[1:], *first] if own else []
    arrays["next_item_id"] = torch.tensor(following).long()
    arrays["next_denominator"] = torch.tensor([float(max(1, sum(each >= 0 for each in following)))])
    return batch_of(arrays)


def gradients(model: Model, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def test_what_follows_an_event_is_the_next_one_or_the_first_candidate() -> None:
    assert next_rows(batch().inputs).tolist() == NEXT


@pytest.mark.parametrize(
    "both",
    [
        config(),
        config("interleave"),
        config(similarity=MixtureOfLogitsConfig(query_vectors=2, item_vectors=2, dim=4, hidden=5)),
    ],
    ids=["plain", "interleaved", "mixture"],
)
def test_loss_and_gradients_are_the_sum_of_a_rankers_and_of_a_softmax_over_its_rows(both: TrainConfig) -> None:
    """The ranker is built by itself, with the trunk's values; the softmax is written out here."""
    model, made = built(resolve(both, info())), batch()
    alone = built(resolve(replace(both, model=replace(both.model, retrieval=None)), info()))
    alone.tower.load_state_dict(model.tower.ranker.state_dict())
    alone.tables.load_state_dict(model.tables.state_dict())
    of_ranker = alone(made)

    rows = rows_by_feature(model.tables(made.features))
    _, hidden = model.tower.ranker.with_events([rows], made.inputs)
    queries = model.tower.similarity.queries(model.tower.output_projection(hidden))
    items, ids = rows["item_id"].values(), made.inputs.ids_host("item_id")
    losses = []
    for event, following in enumerate(NEXT):
        if following >= 0:
            drawn = [place for place in range(NEGATIVES) if 2 * place != ids[following]]
            compared = torch.cat([items[following][None], rows[NEGATIVE_FEATURE].values()[drawn]])
            scores = model.tower.similarity(queries[event][None], model.tower.similarity.items(compared))
            losses.append(F.cross_entropy(scores / TEMPERATURE, torch.tensor([0])))
    of_next = torch.stack(losses).mean()
    assert len(losses) == 9

    torch.testing.assert_close(model(made), of_ranker.detach() + WEIGHT * of_next.detach())
    expected = gradients(model, WEIGHT * of_next)
    for name, gradient in gradients(alone, of_ranker).items():
        name = name.replace("objective.tower.", "objective.tower.ranker.", 1)
        expected[name] = expected[name] + gradient if name in expected else gradient
    found = gradients(model, model(made))
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient.any(), name
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("local", [2, None])
@pytest.mark.parametrize("merge", ["add", "interleave"])
@torch.no_grad()
def test_nothing_of_what_comes_later_reaches_an_event(merge: Any, local: int | None) -> None:
    """Not its items, actions and times, not candidates and their labels, not what describes the request."""
    stated = config(merge)
    stages = (StageConfig(num_layers=2, local=local),)
    model = built(resolve(replace(stated, model=replace(stated.model, stages=stages)), info())).eval()
    arrays = random_arrays([6], [3], context_names=("user_id", "country"), seed=3)
    ids, time = arrays["ids/item_id"], 1_700_000_000 + torch.arange(9) * 7
    later = torch.arange(9) >= 4
    changes: list[dict[str, Tensor]] = [
        {"ids/item_id": torch.where(later, (ids + 1) % NUM_ITEMS, ids)},
        {"action": torch.where(later[:6], ~arrays["action"] & 255, arrays["action"])},
        {"timestamp": torch.where(later, time + 86400, time)},
        {"ids/sample.country": 1 + arrays["ids/sample.country"] % 5},
        {"candidate_action": ~arrays["candidate_action"] & 255},
    ]
    plain = model.score(batch([6], [3], timestamp=time).inputs)
    for change in changes:
        other = model.score(batch([6], [3], **{"timestamp": time, **change}).inputs)
        torch.testing.assert_close(other.events_HE[:4], plain.events_HE[:4], rtol=0, atol=0)
        seen_by_candidates = "candidate_action" not in change
        assert torch.equal(other.labels_CK, plain.labels_CK) != seen_by_candidates
    acted = {"action": arrays["action"] ^ (torch.arange(6) == 3).int()}
    other = model.score(batch([6], [3], timestamp=time, **acted).inputs)
    assert not torch.equal(other.events_HE[3], plain.events_HE[3]), "what was done is known behind the event"
    shorter = model.score(batch([4], [0], **{name: arrays[name][:4] for name in ("ids/item_id", "action")}).inputs)
    # The one user's earlier events alone.
    torch.testing.assert_close(shorter.events_HE, plain.events_HE[:4], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("history", "candidates"), [([0], [0]), ([0, 0], [2, 1]), ([1], [0])])
def test_without_a_next_item_only_labels_are_learnt(history: list[int], candidates: list[int]) -> None:
    model, made = built(resolve(config(), info())), batch(history, candidates)
    outputs = model.score(made.inputs)
    next_loss = model.loss.of_next_items(outputs.events_HE, model.tables(made.features), made)
    assert next_loss.item() == 0
    found = gradients(model, model(made))
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    assert any(gradient.any() for gradient in found.values()) == (sum(candidates) > 0)


@pytest.mark.parametrize("exclude_seen", [False, True])
@torch.no_grad()
def test_evaluation_asks_the_last_event_for_the_first_candidate(exclude_seen: bool) -> None:
    model, made = built(resolve(config(), info())).eval(), batch()
    events = model.score(made.inputs).events_HE
    found = predict(events, made.inputs, exclude_seen=exclude_seen)
    ids = made.inputs.ids_host("item_id")
    assert torch.equal(found.outputs_PE, events[[2, 8]]) and torch.equal(found.targets_P, ids[[11, 14]])
    earlier = [(0, int(ids[row])) for row in (0, 1, 2)] + [(1, int(ids[row])) for row in (4, 5, 6, 7, 8)]
    assert [tuple(pair) for pair in found.seen.T.tolist()] == (earlier if exclude_seen else [])


@pytest.mark.parametrize("merge", ["add", "interleave"])
def test_counted_flops_are_those_of_the_products_that_run(merge: Any) -> None:
    """Attention apart, which runs over whole tiles here."""
    resolved = resolve(config(merge), info())
    model, made = built(resolved), batch()
    with FlopCounterMode(display=False) as counter:
        model(made)
    run = counter.get_total_flops() - counter.get_flop_counts()["Global"].get(torch.ops.aten.bmm, 0)
    count = resolved.task.flops(np.array(HISTORY), np.array(CANDIDATES))
    # The product with the true item is one of elements; sampled negatives are scored once for all.
    assert (count.forward - count.attention).sum() - sum(HISTORY) * 2 * 12 == run


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"input": InputConfig()}, "set model.input.causal=true"),
        (
            {"stages": (), "channels": (ChannelConfig(name="all", dim=16, stages=(StageConfig(num_layers=1),)),)},
            "which model.channels choose from: give model.stages",
        ),
        ({"stages": (StageConfig(num_layers=1, keep_newest=3),)}, "stages.keep_newest must be null"),
        ({"stages": (StageConfig(num_layers=1, local=2, global_rows=1),)}, "stages.global_rows must be 0"),
        ({"layer": LayerConfig(relative_bias=RelativeBiasConfig())}, "layer.relative_bias is for retrievers alone"),
    ],
)
def test_a_model_that_would_leak_or_cannot_be_is_refused(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        replace(config().model, **model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beside_ranking": 0.0}, "beside_ranking must be above 0, got 0.0"),
        ({"share_negatives": False}, "share_negatives=false cannot be with beside_ranking"),
        ({"read_actions": True}, "read_actions has no effect with beside_ranking"),
        ({"read_next_time": True}, "read_next_time has no effect with beside_ranking"),
    ],
)
def test_settings_without_effect_beside_ranking_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_hidden_ids_are_refused() -> None:
    stated, split = config(), SplitInfo(samples=10, history_events=200, candidates=41)
    data = replace(info(), splits={"train": split, "eval": split})
    resolve(stated, data).task.check_training_data()
    hiding = replace(stated, data=replace(stated.data, unknown_share=0.1))
    with pytest.raises(ValueError, match=r"data.unknown_share=0.1 is for rankers alone"):
        resolve(hiding, data).task.check_training_data()


def test_events_that_do_not_read_their_item_are_refused() -> None:
    stated = config()
    model = replace(stated.model, input=replace(stated.model.input, event=()))
    with pytest.raises(ValueError, match="must name item_id"):
        resolve(replace(stated, model=model), info())
