"""Recorded steps: padded batches give the loss and gradients of the batches themselves, whatever their lengths; and on
a GPU, replayed steps give the bits of launched ones."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from attention_kernels.attention import interface
from attention_kernels.attention.portable import launchers as portable
from attention_kernels.launcher import INTERPRETED, compiling_together
from attention_kernels.layer import gather, operations
from embeddings.tables import rows_by_feature
from pipelines.batches.padding import Padding, rounded
from tests.support.batches import random_batch, small_selection
from tests.support.device_alone import DeviceAlone, without_autocast
from tests.trainer.models import test_joint, test_ranker, test_retriever
from trainer.models.model import Model
from trainer.models.negatives import retrieval_batch
from trainer.models.sequence_padding import SequencePadding
from trainer.resolve import resolve
from trainer.steps import recording
from trainer.steps.graphs import Graphs, Recording
from trainer.steps.recording import RecordedObjective

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTHS = [([5, 0, 9], [2, 3, 1]), ([4, 2, 9], [2, 3, 1]), ([0, 0, 0], [1, 0, 0]), ([9], [7]), ([5, 1, 8], [3, 1, 2])]
"""History lengths and candidates of batches; some have the same sizes with padding."""
RANKERS = [
    "paper",
    "production",
    "causal",
    "interleaved",
    "learned_action",
    "columns",
    "columns, pooled",
    "columns, interleaved, mlp",
    "softmax",
    "last_event",
    "target_attention",
]


def ranker(name: str) -> tuple[Model, Padding, list[Any]]:
    pooled = name == "columns, pooled"
    config = test_ranker.CONFIGS[name.removesuffix(", pooled")]
    columns = config in test_ranker.WITH_COLUMNS
    batches = [
        random_batch(history, candidates, context_names=test_ranker.CONTEXT, seed=seed)
        for seed, (history, candidates) in enumerate(LENGTHS)
    ]
    selection = small_selection(test_ranker.CONTEXT, columns=columns)
    chosen, spaces = (test_ranker.tags_apart(selection), {"tag"}) if pooled else (selection, ())
    padding = Padding(chosen, frozenset(spaces), rectangular=config.is_rectangular)
    return test_ranker.small_ranker(config, pooled=pooled or None), padding, batches


def retriever(name: str) -> tuple[Model, SequencePadding, list[Any]]:
    batches = [
        retrieval_batch(
            random_batch(history, candidates, seed=seed),
            num_items=test_retriever.NUM_ITEMS,
            num_negatives=30,
            shared=True,
            seed=3,
            world_size=1,
        )
        for seed, (history, candidates) in enumerate(
            [([3, 1, 0, 5], [1, 0, 2, 1]), ([2, 2, 1, 4], [2, 1, 1, 1]), ([1], [0])]
        )
    ]
    config = {"informed": test_retriever.informed, "softmax": test_retriever.softmax}.get(name, test_retriever.config)()
    if name == "dropout":
        config = replace(config, layer=replace(config.layer, dropout=0.3), input=replace(config.input, dropout=0.2))
    return test_retriever.small(config), SequencePadding(rectangular=config.is_rectangular), batches


def joint(name: str) -> tuple[Model, Padding, list[Any]]:
    resolved = resolve(test_joint.config(), test_joint.info())
    batches = [test_joint.batch(history, candidates) for history, candidates in LENGTHS]
    return test_joint.built(resolved), Padding(resolved.task.selection), batches


RETRIEVERS = ["plain", "informed", "softmax"]
CASES = [*((ranker, name) for name in RANKERS), *((retriever, name) for name in RETRIEVERS), (joint, "plain")]


GPU_CASES = [*CASES, (ranker, "stochastic depth"), (retriever, "dropout")]


def gradients(model: Model, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(batch)
    loss.backward()
    named = [*model.tower.named_parameters(), *model.tables.named_parameters()]
    return loss.detach(), {name: x.grad.to_dense().clone() for name, x in named if x.grad is not None}


def test_sizes_are_eight_an_octave_or_4096_apart() -> None:
    assert [rounded(n) for n in (0, 1, 7, 15, 16, 17, 31, 32, 33)] == [0, 1, 7, 15, 16, 18, 32, 32, 36]
    sizes = {rounded(n) for n in range(1024, 2049)}
    assert len(sizes) == 9 and all(n <= rounded(n) <= 1.125 * n for n in range(1024, 2049))
    assert [rounded(n) for n in (65_537, 200_000, 204_801)] == [69_632, 200_704, 208_896]


@pytest.mark.parametrize(("made", "name", "frozen"), [*((*case, False) for case in CASES), (ranker, "columns", True)])
def test_padded_steps_have_the_loss_and_gradients_of_the_batch_itself(made: Any, name: str, frozen: bool) -> None:
    """One batch after another, in memory that they share: what an earlier one left there does not matter.  Of frozen
    parameters there are none."""
    model, padding, batches = made(name)
    model.to(DEVICE).train()
    batches = [batch.to(DEVICE) for batch in batches]
    stays = dict(list(model.tower.named_parameters())[::2]) if frozen else {}
    for parameter in stays.values():
        parameter.requires_grad_(False)
    expected = [gradients(model, batch) for batch in batches]
    model.objective = RecordedObjective(model.objective, padding, None)
    # The third time, a batch is written over the second.
    for batch, (loss, found) in [*zip(batches, expected, strict=True)] * 3:
        padded_loss, padded = gradients(model, batch)
        torch.testing.assert_close(padded_loss, loss, rtol=1e-5, atol=1e-7)
        assert padded.keys() >= found.keys()
        assert stays.keys().isdisjoint(padded)
        for key, value in padded.items():
            torch.testing.assert_close(value, found.get(key, torch.zeros_like(value)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["columns", "columns, pooled", "interleaved"])
def test_rows_that_a_ranker_casts_are_kept_in_the_type_of_computation(name: str) -> None:
    """Half the bytes, with the same roundings: those of many ids, which are added up first, stay as they are."""
    model, padding, batches = ranker(name)
    model.to(DEVICE).train()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        expected = [gradients(model, batch.to(DEVICE)) for batch in batches]
        model.objective = RecordedObjective(model.objective, padding, None)
        for batch, (loss, found) in [*zip(batches, expected, strict=True)] * 2:
            padded_loss, padded = gradients(model, batch.to(DEVICE))
            torch.testing.assert_close(padded_loss, loss, rtol=1e-2, atol=1e-3)
            for key, value in found.items():
                torch.testing.assert_close(padded[key], value, rtol=5e-2, atol=5e-3 * float(value.abs().max() + 1))
    kept = {name: x.dtype for name, x in zip(padding.lookups(batches[0]), sized_of(model)[0].rows, strict=True)}
    assert kept["item_id"] == torch.bfloat16 and kept.get("tags", torch.float32) == torch.float32


@pytest.mark.parametrize("name", ["paper", "columns", "columns, pooled", "interleaved", "softmax"])
def test_rows_of_single_ids_that_come_in_16_bits_train_as_those_that_are_cast_to_them(name: str) -> None:
    """The same bits of loss and gradients: nothing is added up in 16 bits that was not."""
    model, _, batches = ranker(name)
    model.to(DEVICE).train()
    for batch in batches:
        batch = batch.to(DEVICE)
        with torch.no_grad():
            rows = rows_by_feature(model.tables(batch.features, batch.inputs.bags))
        found = []
        for narrow in (False, True):
            kinds = {key: torch.bfloat16 if narrow and key in model.tower.cast_first else torch.float32 for key in rows}
            values = {key: each.values().to(kinds[key]).requires_grad_() for key, each in rows.items()}
            given = {key: JaggedTensor(each, lengths=rows[key].lengths()) for key, each in values.items()}
            with torch.autocast(DEVICE.type, torch.bfloat16):
                loss = model.objective([given], batch)
            inputs = [*values.values(), *model.tower.parameters()]
            found.append([loss, *torch.autograd.grad(loss, inputs, allow_unused=True)])
        for wide, narrowed in zip(*found, strict=True):
            assert (wide is None) == (narrowed is None)
            assert wide is None or torch.equal(wide, narrowed.to(wide.dtype))


def test_sizes_are_kept_that_come_again_and_no_more_than_are_recorded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Data of ever new sizes takes no more memory with every step."""
    monkeypatch.setattr(recording, "MAX_SIZES", 2)
    model, padding, batches = ranker("paper")
    model.train()
    model.objective = RecordedObjective(model.objective, padding, None)
    assert len({padding.sizes(batch) for batch in batches}) == 4
    for batch, kept in zip([*batches, batches[2], batches[3], batches[0]], [0, 0, 0, 0, 1, 2, 2, 2], strict=True):
        gradients(model, batch)
        assert len(sized_of(model)) == kept
    assert caplog.text.count("others will be launched") == 1


def sized_of(model: Model) -> list[Any]:
    """What batches of each size are computed in."""
    return [*model.objective._sized.values()]


def trained(made: Any, name: str, *, graphs: Graphs | None, steps: int) -> tuple[list[Tensor], list[Tensor]]:
    """Losses and parameters of some steps over batches of changing lengths, evaluation in between."""
    model, padding, batches = made(name)
    model.to(DEVICE).train()
    batches = [batch.to(DEVICE) for batch in batches]
    model.objective = RecordedObjective(model.objective, padding, graphs)
    adam = torch.optim.Adam(model.tower.parameters(), lr=torch.tensor(1e-2, device=DEVICE), fused=True, capturable=True)
    tables = torch.optim.SGD(model.tables.parameters(), lr=0.1)
    losses = []

    def step_adam() -> None:
        adam.step()

    update = Recording("the update", step_adam, graphs)
    for step in range(steps):
        torch.manual_seed(step)
        with torch.autocast("cuda", torch.bfloat16):
            model.zero_grad()
            loss = model(batches[step % len(batches)])
        loss.backward()
        update()
        tables.step()
        losses.append(loss.detach())
        if step % 7 == 6:
            model.eval()
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
                losses.append(model(batches[0]))
            model.train()
    return losses, [*model.parameters()]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("made", "name"), GPU_CASES)
def test_200_replayed_steps_have_the_bits_of_launched_ones(made: Any, name: str) -> None:
    launched, replayed = (trained(made, name, graphs=graphs, steps=200) for graphs in (None, Graphs()))
    for which in (0, 1):
        assert all(torch.equal(x, y) for x, y in zip(launched[which], replayed[which], strict=True))
    assert len({float(loss) for loss in replayed[0]}) > 150


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_replayed_step_shows_nan_and_forgets_it() -> None:
    """A row that is not a number reaches the loss of its batch, and no later one."""
    model, padding, batches = ranker("paper")
    model.to(DEVICE).train()
    model.objective = RecordedObjective(model.objective, padding, Graphs())
    table = next(model.tables.parameters())
    before = table.detach().clone()
    losses = []
    for step in range(6):
        with torch.no_grad():
            table.copy_(torch.full_like(before, torch.nan) if step == 4 else before)
        losses.append(gradients(model, batches[0].to(DEVICE))[0])
    assert losses[4].isnan()
    assert all(torch.equal(losses[0], loss) for loss in (*losses[:4], losses[5]))


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is recorded runs alone on the meta device, through the code of a GPU: kernels are chosen and not run."""

    differentiate = RecordedObjective._differentiate

    def alone(*arguments: Any) -> None:
        with compiling_together(), torch.autograd.set_multithreading_enabled(False), DeviceAlone():
            differentiate(*arguments)

    monkeypatch.setattr(RecordedObjective, "_differentiate", alone)
    monkeypatch.setattr(interface, "_choose_backend", lambda *_, biased=False: portable)
    for module in (operations, gather):
        monkeypatch.setattr(module, "layer_backend", lambda _: "triton")
    without_autocast(monkeypatch)


@pytest.mark.skipif(not INTERPRETED, reason="compiles kernels for what is no GPU")
@pytest.mark.parametrize(("made", "name"), GPU_CASES)
def test_what_is_recorded_neither_waits_for_the_device_nor_copies_from_the_host(
    made: Any, name: str, on_meta: None
) -> None:
    """What a CUDA graph refuses, without a GPU."""
    model, padding, batches = made(name)
    model.train()
    model.objective.to("meta")
    recorded = RecordedObjective(model.objective, padding, None)
    # With events, and with none.
    for batch in batches[:3:2]:
        counts = padding.lookups(batch)
        rows = rows_by_feature(model.tables(batch.inputs.features, batch.inputs.bags))
        values = [rows[key].values()[: sum(count.real for count in each)].to("meta") for key, each in counts.items()]
        recorded.run(batch.to(torch.device("meta")), counts, values)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x[[2, 1, 0]],
        lambda x: x + torch.ones(3),
        lambda x: x.to("cpu"),
        lambda x: x.nonzero(),
        lambda x: torch.tensor([1.0, 2.0, 3.0], device=x.device) + x,
        lambda x: float(x.sum()),
    ],
)
def test_what_a_graph_refuses_is_seen_without_a_gpu(spoil: Any) -> None:
    x = torch.zeros(3, device="meta")
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), DeviceAlone():
        spoil(x)
    with DeviceAlone():
        assert (torch.where(x > 0, x, 0) + torch.arange(3, device=x.device)).is_meta


@pytest.mark.parametrize("must", [True, False])
def test_what_cannot_be_recorded_is_an_error_or_launched(
    must: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """recorded=on and recorded=auto, which then records nothing more."""

    def fail(*_: Any) -> None:
        raise RuntimeError("the step cannot be recorded (recorded=off launches it): unsupported")

    monkeypatch.setattr(Graphs, "_record", fail)
    graphs, calls = Graphs(must=must), []
    steps = [Recording(name, lambda: calls.append(1), graphs) for name in ("the step", "the update")]
    for step in steps:
        step()
    if must:
        with pytest.raises(RuntimeError, match="the step cannot be recorded"):
            steps[0]()
        return
    for step in steps * 2:
        step()
    assert len(calls) == 6 and caplog.text.count("steps are launched from now on") == 1


def index_by_list(x: Tensor) -> None:
    """Python's numbers are copied to the device: PyTorch refuses."""
    x += x.clone()[[2, 1, 0]]


def wait_for_value(x: Tensor) -> None:
    """The host waits for the device: CUDA then calls the capture void."""
    x *= float(x.sum())


def drawn(graphs: Graphs | None, spoil: Callable[[Tensor], None] | None) -> list[Tensor]:
    """What two recordings draw in some steps; the second, which comes later, spoils its capture."""
    x, found = torch.zeros(3, device=DEVICE), []

    def draw() -> None:
        x.copy_(torch.rand(3, device=DEVICE))

    def draw_spoilt() -> None:
        draw()
        if spoil is not None:
            spoil(x)

    first, second = Recording("first", draw, graphs), Recording("second", draw_spoilt, graphs)
    for step in range(8):
        torch.manual_seed(step)
        first()
        found.append(x.clone())
        if step > 3:
            second()
            found.append(x.clone())
    return found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("spoil", [index_by_list, wait_for_value])
def test_a_recording_that_fails_leaves_draws_memory_and_later_recordings_whole(
    spoil: Callable[[Tensor], None], caplog: pytest.LogCaptureFixture
) -> None:
    expected = drawn(None, spoil)
    found = drawn(Graphs(must=False), spoil)
    assert caplog.text.count("second cannot be recorded") == 1
    assert all(torch.equal(x, y) for x, y in zip(expected, found, strict=True))
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    del expected, found
    before = torch.cuda.memory_allocated()
    big = torch.zeros(2**26, device=DEVICE).uniform_()
    assert big.min() < big.max()
    del big
    assert torch.cuda.memory_allocated() == before
    launched, replayed = (trained(retriever, "dropout", graphs=graphs, steps=30) for graphs in (None, Graphs()))
    for which in (0, 1):
        assert all(torch.equal(x, y) for x, y in zip(launched[which], replayed[which], strict=True))
