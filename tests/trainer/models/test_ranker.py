"""The ranker: empty batches, candidate invariance, TorchRec's pipeline, errors."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from embeddings.config import TableConfig
from embeddings.tables import build_tables, init_tables
from pipelines.selection import Selection
from tests.support.batches import (
    CONTEXT_VOCAB,
    NUM_ACTIONS,
    NUM_ITEMS,
    NUM_TABS,
    batch_of,
    random_arrays,
    random_batch,
    random_rows,
    small_selection,
)
from tests.support.datasets import made_up_info
from trainer.labels.config import LabelConfig
from trainer.labels.loss import build_ranking_loss
from trainer.models.config import ChannelConfig, InputConfig, ModelConfig, NumberConfig, StageConfig
from trainer.models.encoding import num_context
from trainer.models.flops import input_widths, ranker_flops
from trainer.models.heads.config import MlpConfig
from trainer.models.layer_config import LayerConfig
from trainer.models.model import Model
from trainer.models.ranker import build_ranker_tower

CONTEXT = ("user_id", "country")
WIDTHS = {"item": 12, "tab": 8, "tag": 8, "user_id": 12, "country": 4}
"""Of the tables' rows."""
ACTIONS = tuple(f"action_{index}" for index in range(NUM_ACTIONS))
LAYER = LayerConfig(num_heads=2, qk_dim=8, value_dim=8)
STAGES = (
    StageConfig(num_layers=1, local=2, global_rows=2),
    StageConfig(num_layers=1, keep_newest=3),
)


def model_config(**changes: Any) -> ModelConfig:
    return replace(ModelConfig(dim=16, max_len=32, layer=LAYER, stages=STAGES), **changes)


def tags_apart(selection: Selection) -> Selection:
    """With a table for the tags alone."""
    features = [replace(each, space="tag") if each.name == "tags" else each for each in selection.features]
    return replace(selection, features=tuple(features))


def small_ranker(
    config: ModelConfig,
    context_names: tuple[str, ...] = CONTEXT,
    *,
    columns: bool | None = None,
    pooled: bool | None = None,
) -> Model:
    """`pooled` tells whether tags, in a table of their own, are summed where its rows lie; None for a shared table."""
    torch.manual_seed(0)
    selection = small_selection(context_names, columns=config in WITH_COLUMNS if columns is None else columns)
    selection = selection if pooled is None else tags_apart(selection)
    rows = {"item": NUM_ITEMS, "tab": NUM_TABS, "tag": NUM_TABS, **dict.fromkeys(context_names, CONTEXT_VOCAB)}
    names = {space: tuple(each.name for each in selection.features if each.space == space) for space in rows}
    configs = [
        TableConfig(
            name=space,
            embedding_dim=WIDTHS[space],
            num_embeddings=rows[space],
            features=features,
            pooled="event" if space == "tag" and pooled else None,
        )
        for space, features in names.items()
        if features
    ]
    tables = build_tables(configs, device=torch.device("cpu"))
    loss = build_ranking_loss(config.labels, made_up_info(num_items=NUM_ITEMS, actions=ACTIONS))
    tower = build_ranker_tower(
        config,
        selection=selection,
        widths=WIDTHS,
        action_names=ACTIONS,
        output_bits=loss.output_bits,
        pooled=("tag",) if pooled else (),
    )
    return Model(tables, tower, loss)


CONFIGS = {
    "paper": model_config(),
    "production": model_config(layer=replace(LAYER, variant="production", norm="group")),
    "interleaved": model_config(input=InputConfig(merge="interleave")),
    "learned_action": model_config(input=InputConfig(candidate_action="learned"), head=MlpConfig(hidden=(8, 12))),
    "causal": model_config(input=InputConfig(causal=True)),
    "channels": model_config(
        stages=(),
        channels=(
            ChannelConfig(name="clicks", dim=16, stages=STAGES, actions=("action_0", "action_3")),
            ChannelConfig(name="watched", dim=8, stages=STAGES[:1], layer=replace(LAYER, num_heads=1), side="play_s"),
        ),
    ),
    "stochastic depth": model_config(layer=replace(LAYER, stochastic_depth=0.5)),
    "columns": model_config(input=InputConfig(numbers={"play_s": NumberConfig(buckets=4)})),
    "columns, interleaved, mlp": model_config(
        input=InputConfig(merge="interleave", combine="mlp", pooling={"tags": "sum"})
    ),
    "fp8": model_config(layer=replace(LAYER, fp8=True)),
    "softmax": model_config(layer=replace(LAYER, variant="softmax"), stages=(StageConfig(num_layers=2),)),
    "last_event": model_config(layer=replace(LAYER, variant="last_event"), stages=(StageConfig(num_layers=2),)),
    "target_attention": model_config(
        layer=LayerConfig(variant="target_attention", num_heads=2, qk_dim=8), stages=(StageConfig(num_layers=1),)
    ),
}
WITH_COLUMNS = [CONFIGS[name] for name in ("channels", "columns", "columns, interleaved, mlp")]
"""Models that read the columns of events and candidates too."""


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    ranker = small_ranker(CONFIGS[name])
    # Stochastic depth then skips a layer for some users only.
    torch.manual_seed(1)
    ranker(random_batch([5, 0, 9], [2, 3, 1], context_names=CONTEXT)).backward()
    missing = [
        name for name, parameter in ranker.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert not missing


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("users", [0, 1])
def test_batch_without_tokens_gives_zero_loss_and_zero_gradients(name: str, users: int) -> None:
    ranker = small_ranker(CONFIGS[name])
    batch = random_batch([0] * users, [0] * users, context_names=CONTEXT)
    # TorchRec cannot look up for no samples at all, the tower computes on none.
    embedded = ranker.tables(batch.inputs.features) if users else [random_rows(batch, WIDTHS)]
    outputs = ranker.tower(embedded, batch.inputs)
    loss = ranker.loss(outputs, embedded, batch)
    loss.backward()
    assert loss.item() == 0 and outputs.shape == (0, NUM_ACTIONS)
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in ranker.tower.parameters())


@pytest.mark.parametrize("name", ["columns", "columns, interleaved, mlp"])
@pytest.mark.parametrize("lens", [([5, 0, 9], [2, 3, 1]), ([0, 0], [2, 1])])
def test_sums_that_a_table_gives_train_as_rows_that_are_added_up(name: str, lens: tuple[list[int], list[int]]) -> None:
    """Means and sums, of bags with and without ids, and where there is no bag."""
    rankers = [small_ranker(CONFIGS[name], pooled=pooled) for pooled in (False, True)]
    batch = random_batch(*lens, context_names=CONTEXT)
    losses, gradients = [], []
    for ranker in rankers:
        init_tables(ranker.tables, seed=3)
        losses.append(ranker(batch))
        losses[-1].backward()
        of_tables = {key.split(".")[-2]: value for key, value in ranker.tables.named_parameters()}
        named = {**dict(ranker.tower.named_parameters()), **of_tables}
        gradients.append({key: value.grad for key, value in named.items()})
    torch.testing.assert_close(losses[1], losses[0])
    assert gradients[0].keys() == gradients[1].keys() and "tag" in gradients[0]
    for key, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", CONFIGS)
def test_counted_flops_are_those_of_the_products_that_run(name: str) -> None:
    """All but attention, whose pairs are tested against the dense mask: the reference multiplies them all."""
    arrays = random_arrays([5, 0, 9], [2, 3, 1], context_names=CONTEXT)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        small_ranker(CONFIGS[name])(batch_of(arrays))
    histories = (slice(0, 5), slice(5, 5), slice(5, 14))
    chosen = {"clicks": arrays["action"] & 0b1001, "watched": arrays["number/play_s"].nan_to_num()}
    selection = small_selection(CONTEXT, columns=CONFIGS[name] in WITH_COLUMNS)
    counted = ranker_flops(
        CONFIGS[name],
        np.array([5, 0, 9]),
        np.array([2, 3, 1]),
        inputs=input_widths(selection, widths=WIDTHS, config=CONFIGS[name], num_actions=NUM_ACTIONS),
        num_context=num_context(selection, CONFIGS[name].input),
        num_outputs=NUM_ACTIONS,
        channel_history_lens={
            channel: np.array([int((values[rows] != 0).sum()) for rows in histories])
            for channel, values in chosen.items()
        },
    )
    counts = counter.get_flop_counts()["Global"]
    run = sum(count for product, count in counts.items() if product in (torch.ops.aten.mm, torch.ops.aten.addmm))
    assert (counted.forward - counted.attention).sum() == run
    assert counted.attention.sum() > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_data_without_context_times_and_actions_train(name: str) -> None:
    """What a log may lack: every time is then the unknown one, and channels that select by action see nothing."""
    ranker = small_ranker(CONFIGS[name], context_names=())
    arrays = random_arrays([5, 0, 9], [2, 3, 1])
    arrays |= {"action": torch.zeros_like(arrays["action"]), "timestamp": torch.full_like(arrays["timestamp"], -1)}
    loss = ranker(batch_of(arrays))
    loss.backward()
    assert loss.isfinite()
    encoder = ranker.tower.encoder
    for vectors in (encoder.age_vectors, encoder.candidate_gap_vectors):
        assert vectors.grad is not None and vectors.grad[0].any() and not vectors.grad[1:].any()


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_do_not_depend_on_the_other_candidates(name: str) -> None:
    ranker = small_ranker(CONFIGS[name]).eval()
    arrays = random_arrays([7], [1], context_names=CONTEXT)

    def insert(name: str, extra: list[Any]) -> torch.Tensor:
        array = arrays[name]
        return torch.cat([array[:-1], torch.tensor(extra, dtype=array.dtype), array[-1:]])

    # The same candidate third of three: the others get items, columns, labels and times of their own.
    others = {
        "ids/item_id": insert("ids/item_id", [11, 12]),
        "num_candidates": torch.tensor([3]),
        "number/price": insert("number/price", [70.0, 90.0]),
        "timestamp": insert("timestamp", [1_800_000_000, -1]),
        "candidate_action": insert("candidate_action", [1, 2]),
    }
    alone, together = (batch_of(each) for each in (arrays, arrays | others))
    scores = [ranker.score(batch.inputs) for batch in (alone, together)]
    torch.testing.assert_close(scores[1][2:], scores[0], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(scores[1][0], scores[1][2])


@pytest.mark.parametrize("name", CONFIGS)
def test_permuted_candidates_keep_their_scores(name: str) -> None:
    """With histories that truncation and channels cut, and with one that is empty."""
    ranker = small_ranker(CONFIGS[name]).eval()
    arrays = random_arrays([7, 0, 9], [3, 4, 1], context_names=CONTEXT)
    order_C = torch.tensor([2, 0, 1, 6, 5, 3, 4, 7])
    permuted = dict(arrays)
    for key in ("ids/item_id", "timestamp", "number/price", "candidate_action"):
        first = len(arrays[key]) - 8
        permuted[key] = torch.cat([arrays[key][:first], arrays[key][first + order_C]])
    scores, moved = (ranker.score(batch_of(each).inputs) for each in (arrays, permuted))
    torch.testing.assert_close(moved, scores[order_C], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(moved, scores)


@pytest.mark.parametrize("name", CONFIGS)
def test_labels_change_no_score(name: str) -> None:
    ranker = small_ranker(CONFIGS[name]).eval()
    arrays = random_arrays([4, 2], [2, 2], context_names=CONTEXT)
    batch, changed = (batch_of(each) for each in (arrays, arrays | {"candidate_action": torch.full((4,), 255).int()}))
    torch.testing.assert_close(ranker.score(changed.inputs), ranker.score(batch.inputs), rtol=0, atol=0)


def test_mixture_of_one_channel_over_all_events_equals_the_plain_tower() -> None:
    plain = small_ranker(model_config())
    channel = ChannelConfig(name="every", dim=16, stages=STAGES, actions=ACTIONS)
    mixture = small_ranker(model_config(stages=(), channels=(channel,)))
    mixture.load_state_dict({name.replace(".all.", ".every."): value for name, value in plain.state_dict().items()})
    arrays = random_arrays([5, 0, 9], [2, 3, 1], context_names=CONTEXT)
    # Every event has some action, so the channel's choice runs and leaves out nothing.
    arrays["action"] = torch.where(arrays["action"] == 0, 1, arrays["action"])
    batch = batch_of(arrays)
    losses = [ranker(batch) for ranker in (plain, mixture)]
    assert losses[0].item() == losses[1].item()


@pytest.mark.parametrize("name", ["items", "keys", "type", "forward", "training"])
def test_a_channel_may_have_a_name_that_pytorch_uses(name: str) -> None:
    channels = tuple(ChannelConfig(name=each, dim=16, stages=STAGES) for each in (name, "other"))
    ranker = small_ranker(model_config(stages=(), channels=channels))
    assert ranker(random_batch([2], [1], context_names=CONTEXT)).isfinite()


def test_unknown_action_of_a_channel_is_refused() -> None:
    channel = ChannelConfig(name="swipes", dim=16, stages=STAGES, actions=("swipe",))
    with pytest.raises(ValueError, match="channel 'swipes' selects by 'swipe', which is none of the data's actions"):
        small_ranker(model_config(stages=(), channels=(channel,)))


def test_stochastic_depth_keeps_evaluation_and_changes_training() -> None:
    batch = random_batch([5, 3, 9], [2, 3, 1], context_names=CONTEXT)
    plain, skipping = small_ranker(model_config()), small_ranker(CONFIGS["stochastic depth"])
    assert plain.eval()(batch).item() == skipping.eval()(batch).item()
    losses = {skipping.train()(batch).item() for _ in range(8)}
    assert len(losses) > 1


def test_dropped_events_reach_candidates_through_earlier_layers_only() -> None:
    """With truncation in front of every layer, older events change nothing; behind a layer they do."""
    arrays = random_arrays([9], [2], context_names=CONTEXT)
    other_action = {"action": arrays["action"] ^ torch.tensor([255] * 3 + [0] * 6, dtype=torch.int32)}
    batch, changed = (batch_of(each) for each in (arrays, arrays | other_action))
    for stages, same in (((replace(STAGES[1], keep_newest=4),), True), (STAGES, False)):
        ranker = small_ranker(model_config(stages=stages)).eval()
        assert torch.equal(ranker.score(batch.inputs), ranker.score(changed.inputs)) is same


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["paper", "production", "interleaved", "channels", "columns"])
def test_a_step_on_a_gpu_does_not_wait_for_it(name: str) -> None:
    layer = LayerConfig(num_heads=2, qk_dim=32, value_dim=32, variant="production" if name == "production" else "paper")
    channels = tuple(replace(channel, dim=64, layer=None) for channel in CONFIGS[name].channels)
    config = replace(CONFIGS[name], dim=64, layer=layer, channels=channels, max_len=512)
    device = torch.device("cuda")
    ranker = small_ranker(config, columns=CONFIGS[name] in WITH_COLUMNS).to(device)
    batch = random_batch([150, 3, 90], [2, 3, 1], context_names=CONTEXT).to(device)
    embedded = [random_rows(batch, WIDTHS)]
    for mode in ("default", "error"):
        # The first step compiles, which may wait.
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.autocast("cuda", torch.bfloat16):
                loss = ranker.loss(ranker.tower(embedded, batch.inputs), embedded, batch)
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


@pytest.mark.filterwarnings("ignore")  # Dynamo warns about what it does itself: .grad of results, made-up Functions
@pytest.mark.parametrize("name", ["paper", "channels"])
def test_compiled_model_computes_the_same(name: str) -> None:
    """torch.compile traces what lies between the layers; layers and attention run as they are."""
    batch = random_batch([5, 0, 9], [2, 3, 1], context_names=CONTEXT)
    rankers = [small_ranker(CONFIGS[name]) for _ in range(2)]
    towers = [rankers[0].tower, torch.compile(rankers[1].tower, backend="aot_eager")]
    with torch.no_grad():
        embedded = rankers[0].tables(batch.features)
    losses = [rankers[0].loss(tower(embedded, batch.inputs), embedded, batch) for tower in towers]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-7)
    for loss in losses:
        loss.backward()
    for plain, compiled in zip(rankers[0].tower.parameters(), rankers[1].tower.parameters(), strict=True):
        torch.testing.assert_close(compiled.grad, plain.grad, rtol=1e-5, atol=1e-6)


def test_too_long_a_sequence_is_refused_with_the_fix() -> None:
    ranker = small_ranker(model_config(max_len=8))
    with pytest.raises(ValueError, match=r"12 tokens, more than model.max_len=8: raise max_len"):
        ranker(random_batch([9], [1], context_names=CONTEXT))


def test_unknown_label_is_refused() -> None:
    with pytest.raises(
        ValueError, match="'swipe', which made up does not have; label columns: none; actions: action_0"
    ):
        small_ranker(model_config(labels=(LabelConfig(name="swipe"),)))
