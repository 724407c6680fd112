"""The retriever: batches and negatives, the loss against a plain formula, what is evaluated, causality, errors."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_kernels.rectangle import make_rectangle
from embeddings.config import TableConfig
from embeddings.tables import build_tables
from tests.support.batches import NUM_ACTIONS, NUM_ITEMS, random_batch
from trainer.labels.config import LabelConfig
from trainer.models.config import InputConfig, ModelConfig, StageConfig
from trainer.models.heads.config import DotProductConfig, MixtureOfLogitsConfig, MlpConfig
from trainer.models.layer_config import LayerConfig
from trainer.models.layout import make_layout
from trainer.models.model import Model
from trainer.models.negatives import NEGATIVE_FEATURE, RetrievalBatch, retrieval_batch
from trainer.models.relative_config import RelativeBiasConfig
from trainer.models.retrieval_config import RetrievalConfig
from trainer.models.retriever import build_retriever, evaluated_rows, rows_with_next
from trainer.models.softmax import SoftmaxLayer
from trainer.tasks.retrieval import predict

HISTORY, CANDIDATES = [3, 1, 0, 5], [1, 0, 2, 1]
LENS = [4, 1, 2, 6]
EMBEDDING_DIM, NEGATIVES, TEMPERATURE = 12, 30, 0.1


def config(*, share: bool = True, normalise: bool = True, dim: int = 16, max_len: int = 8) -> ModelConfig:
    return ModelConfig(
        dim=dim,
        max_len=max_len,
        layer=LayerConfig(num_heads=2, qk_dim=8, value_dim=8),
        stages=(StageConfig(num_layers=2),),
        input=InputConfig(num_positions=4),
        retrieval=RetrievalConfig(
            num_negatives=NEGATIVES,
            share_negatives=share,
            temperature=TEMPERATURE,
            similarity=DotProductConfig(normalise=normalise),
        ),
    )


def small(model: ModelConfig) -> Model:
    torch.manual_seed(0)
    table = TableConfig(
        name="item_id",
        embedding_dim=EMBEDDING_DIM,
        num_embeddings=NUM_ITEMS,
        features=("item_id", NEGATIVE_FEATURE),
    )
    return build_retriever(
        model,
        tables=build_tables([table], device=torch.device("cpu")),
        embedding_dim=EMBEDDING_DIM,
        num_actions=NUM_ACTIONS,
    )


def batch_of(*, share: bool = True, negatives: int = NEGATIVES, world_size: int = 1) -> RetrievalBatch:
    batch = random_batch(HISTORY, CANDIDATES)
    return retrieval_batch(
        batch, num_items=NUM_ITEMS, num_negatives=negatives, shared=share, seed=3, world_size=world_size
    )


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("share", [True, False])
def test_loss_is_the_sampled_softmax_of_each_next_item(share: bool, normalise: bool) -> None:
    model, batch = small(config(share=share, normalise=normalise)), batch_of(share=share)
    loss = model(batch)
    table = next(model.tables.parameters())
    encoded = model.score(batch.inputs)
    outputs, layout = encoded.vectors, encoded.layout
    outputs = torch.nn.functional.normalize(outputs, dim=1) if normalise else outputs
    vectors = torch.nn.functional.normalize(table, dim=1) if normalise else table
    drawn = batch.negative_ids.expand(9, NEGATIVES) if share else batch.negative_ids
    losses = []
    for start, end in zip(layout.offsets[:-1].tolist(), layout.offsets[1:].tolist(), strict=True):
        for row in range(start, end - 1):
            target = int(batch.inputs.item_ids[row + 1])
            others = [n for n in drawn[len(losses)].tolist() if n != target]
            scores = vectors[[target, *others]] @ outputs[row] / TEMPERATURE
            losses.append(-torch.log_softmax(scores, 0)[0])
    assert len(losses) == 9
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_history_and_candidates_are_one_sequence() -> None:
    batch = batch_of(negatives=0)
    assert batch.inputs.lens_host.tolist() == LENS
    assert batch.inputs.features["item_id"].values().tolist() == batch.inputs.item_ids.tolist()
    assert batch.num_evaluated_host.tolist() == CANDIDATES
    assert batch.inputs.features[NEGATIVE_FEATURE].values().numel() == 0


@pytest.mark.parametrize("share", [True, False])
def test_negatives_do_not_depend_on_which_rank_draws_them(share: bool) -> None:
    """Users on a rank of their own draw what they draw beside others, and other batches draw other items."""
    whole = random_batch(HISTORY, CANDIDATES)
    options = {"num_items": NUM_ITEMS, "num_negatives": NEGATIVES, "shared": share, "seed": 3}
    everyone = retrieval_batch(whole, world_size=1, **options).negative_ids
    alone = random_batch(HISTORY[3:], CANDIDATES[3:])
    alone.inputs.user_id = whole.inputs.user_id[3:]
    drawn = retrieval_batch(alone, world_size=2, **options).negative_ids
    assert torch.equal(drawn, everyone if share else everyone[4:])
    later = random_batch(HISTORY, CANDIDATES)
    later.position = replace(later.position, batches=1)
    assert not torch.equal(retrieval_batch(later, world_size=1, **options).negative_ids, everyone)
    assert everyone.min() >= 0 and everyone.max() < NUM_ITEMS and len(everyone.unique()) > 15


def test_each_prediction_has_negatives_of_its_own() -> None:
    drawn = batch_of(share=False).negative_ids
    assert drawn.shape == (9, NEGATIVES)
    assert len({tuple(row) for row in drawn.tolist()}) == 9


def test_loss_denominator_makes_the_mean_over_ranks_the_global_mean() -> None:
    assert batch_of(world_size=1).loss_denominator == 9
    assert batch_of(world_size=3).loss_denominator == 3


def test_rows_in_front_of_what_is_predicted() -> None:
    lens, none = torch.tensor(LENS), torch.zeros(4, dtype=torch.long)
    layout = make_layout(lens, none, lens, none)
    assert rows_with_next(layout).tolist() == [0, 1, 2, 5, 7, 8, 9, 10, 11]
    count = torch.tensor(CANDIDATES)
    # The third user's first candidate has no event in front of it.
    assert evaluated_rows(layout, count, count).tolist() == [2, 5, 11]


@pytest.mark.parametrize("share", [True, False])
def test_a_batch_without_a_next_item_gives_zero_loss_and_zero_gradients(share: bool) -> None:
    model = small(config(share=share))
    batch = retrieval_batch(
        random_batch([1, 0], [0, 0]), num_items=NUM_ITEMS, num_negatives=4, shared=share, seed=0, world_size=1
    )
    loss = model(batch)
    loss.backward()
    assert loss.item() == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def softmax() -> ModelConfig:
    """A retriever with a Transformer's layers."""
    return replace(config(), layer=LayerConfig(variant="softmax", num_heads=2, qk_dim=8, value_dim=4, scale=0.4))


SEMI_LOCAL = replace(config(), stages=(StageConfig(num_layers=2, local=1, global_columns=1),))


@pytest.mark.parametrize("chosen", [config(), SEMI_LOCAL, softmax()])
def test_a_users_later_events_do_not_change_earlier_outputs(chosen: ModelConfig) -> None:
    tower = small(chosen).tower.eval()
    rows = torch.randn(6, EMBEDDING_DIM)

    def outputs(count: int) -> Tensor:
        inputs = retrieval_batch(
            random_batch([count], [0]), num_items=NUM_ITEMS, num_negatives=0, shared=True, seed=0, world_size=1
        ).inputs
        encoded: Tensor = tower.encode(rows[:count], inputs).vectors
        return encoded

    torch.testing.assert_close(outputs(6)[:4], outputs(4))


def test_a_batch_for_evaluation_needs_no_negatives_to_be_scored() -> None:
    model = small(config()).eval()
    scored, trained = model.score(batch_of(negatives=0).inputs), model.score(batch_of().inputs)
    torch.testing.assert_close(scored.vectors, trained.vectors)
    assert scored.vectors.shape == (sum(LENS), EMBEDDING_DIM)


def informed() -> ModelConfig:
    """A retriever that reads all that it can, with a full softmax."""
    base = config()
    assert base.retrieval is not None
    return replace(
        base,
        layer=replace(base.layer, relative_bias=RelativeBiasConfig(num_time_buckets=9)),
        input=replace(base.input, num_time_buckets=9),
        retrieval=replace(base.retrieval, num_negatives=None, read_actions=True, read_next_time=True),
    )


def test_a_full_softmax_scores_every_item_once() -> None:
    model = small(informed())
    batch = retrieval_batch(
        random_batch(HISTORY, CANDIDATES), num_items=NUM_ITEMS, num_negatives=None, shared=True, seed=3, world_size=1
    )
    outputs = model.score(batch.inputs)
    rows = rows_with_next(outputs.layout)
    table = torch.nn.functional.normalize(next(model.tables.parameters()), dim=1)
    scores = torch.nn.functional.normalize(outputs.vectors[rows], dim=1) @ table.T / TEMPERATURE
    expected = torch.nn.functional.cross_entropy(scores, batch.inputs.item_ids[rows + 1])
    loss = model(batch)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_a_transformers_layer_is_its_formula() -> None:
    torch.manual_seed(0)
    layer = SoftmaxLayer(dim=16, layer=softmax().layer).eval()
    x = torch.randn(9, 16)
    user, index = torch.tensor([0] * 5 + [1] * 4), torch.tensor([*range(5), *range(4)])
    found = layer(x, make_rectangle(user, index, num_users=2, longest=5))
    y = layer.attention_norm(x)
    q, (k, v) = layer.query(y).view(9, 2, 8), layer.key_value(x).split([16, 8], dim=1)
    for row in range(9):
        seen = (user == user[row]) & (index <= index[row])
        heads = [
            torch.softmax(0.4 * k[seen].view(-1, 2, 8)[:, head] @ q[row, head], 0) @ v[seen].view(-1, 2, 4)[:, head]
            for head in range(2)
        ]
        z = layer.hidden_norm(y[row] + layer.attention_output(torch.cat(heads)))
        torch.testing.assert_close(found[row], z + layer.output(torch.relu(layer.hidden(z))), rtol=1e-4, atol=1e-5)


def test_an_output_knows_its_past_and_when_the_next_event_comes_and_nothing_else() -> None:
    model = small(informed()).eval()
    batch = retrieval_batch(
        random_batch([5], [1]), num_items=NUM_ITEMS, num_negatives=0, shared=True, seed=0, world_size=1
    )

    seconds = 10 * torch.arange(6)
    known = replace(batch.inputs, time=seconds, next_time=seconds + 10)

    def changed(**inputs: Tensor) -> list[bool]:
        """Which of the six outputs differ from those of the batch."""
        first, second = (model.score(x).vectors for x in (known, replace(known, **inputs)))
        return (first != second).any(1).tolist()

    at_3 = torch.arange(6) == 3
    action = torch.where(at_3, known.action ^ 1, known.action).int()
    assert changed(action=action) == [False, False, False, True, True, True]
    next_time = torch.where(at_3, known.next_time + 10**6, known.next_time)
    assert changed(next_time=next_time) == [False, False, False, True, True, True]


def test_the_next_time_is_that_of_the_event_behind_and_actions_are_those_of_events_and_candidates() -> None:
    batch = random_batch(HISTORY, CANDIDATES)
    inputs = retrieval_batch(batch, num_items=NUM_ITEMS, num_negatives=0, shared=True, seed=0, world_size=1).inputs
    events, candidates = iter(batch.inputs.action.tolist()), iter(batch.labels.action.tolist())
    expected = [next(of) for h, c in zip(HISTORY, CANDIDATES, strict=True) for of in [*[events] * h, *[candidates] * c]]
    assert inputs.action.tolist() == expected
    times = torch.split(inputs.time, LENS)
    assert inputs.next_time.tolist() == [t for own in times for t in [*own[1:].tolist(), int(own[-1])]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"newest_events": 0, "exclude_seen": True}, "newest_events must be at least 1"),
        ({"newest_events": 3}, "be null without exclude_seen"),
        ({"newest_events": 3, "exclude_seen": True, "beside_ranking": 1.0}, "cannot be with beside_ranking"),
    ],
)
def test_newest_events_without_effect_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RetrievalConfig(**changes)


def test_events_before_the_newest_leave_their_items_out_and_nothing_else() -> None:
    model, whole = small(informed()).eval(), random_batch([5, 2], [2, 1])
    options: dict[str, Any] = {"num_items": NUM_ITEMS, "num_negatives": 0, "shared": True, "seed": 0, "world_size": 1}
    of_whole, of_newest = retrieval_batch(whole, **options), retrieval_batch(whole, **options, newest=3)
    read = torch.tensor([2, 3, 4, 5, 6, 7, 8, 9])
    for name in ("item_ids", "action", "time", "next_time"):
        assert torch.equal(getattr(of_newest.inputs, name), getattr(of_whole.inputs, name)[read])
    assert of_newest.inputs.lens.tolist() == [5, 3]
    predicted, expected = (predict(model.score(each.inputs), each, exclude_seen=True) for each in (of_newest, of_whole))
    assert torch.equal(predicted.targets_P, expected.targets_P)
    assert sorted(predicted.seen.T.tolist()) == sorted(expected.seen.T.tolist())


@pytest.mark.parametrize("share", [True, False])
def test_a_mixture_of_logits_trains_like_a_dot_product(share: bool) -> None:
    """Every parameter gets a gradient, and a batch without predictions gives zero gradients."""
    mixture = MixtureOfLogitsConfig(query_vectors=3, item_vectors=2, dim=4, hidden=5)
    base = config(share=share)
    assert base.retrieval is not None
    model = small(replace(base, retrieval=replace(base.retrieval, similarity=mixture)))
    model(batch_of(share=share)).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    model.zero_grad()
    none = retrieval_batch(
        random_batch([1, 0], [0, 0]), num_items=NUM_ITEMS, num_negatives=4, shared=share, seed=0, world_size=1
    )
    loss = model(none)
    loss.backward()
    assert loss.item() == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_too_long_a_sequence_is_refused_with_the_fix() -> None:
    with pytest.raises(ValueError, match=r"6 events, more than model.max_len=5: raise max_len"):
        small(config(max_len=5))(batch_of())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": (LabelConfig(name="click"),)}, "model.labels has no effect"),
        ({"head": MlpConfig(hidden=(4,))}, "model.head has no effect"),
        ({"input": InputConfig(candidate_action="learned")}, "only num_positions, dropout have an effect"),
        ({"stages": (StageConfig(num_layers=1, keep_newest=3),)}, "keep_newest must be null"),
        ({"stages": (StageConfig(num_layers=1, local=2, global_rows=1),)}, "stages.global_rows must be 0"),
    ],
)
def test_settings_without_effect_on_a_retriever_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(config(), **changes)
