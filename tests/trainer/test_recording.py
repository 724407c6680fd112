"""Recorded steps: padded batches give the loss and gradients of the batches themselves, whatever their lengths; and on
a GPU, replayed steps give the bits of launched ones."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.padding import Padding, rounded
from tests.support.batches import random_batch, small_selection
from tests.trainer.models import test_joint, test_ranker, test_retriever
from trainer.models.model import Model
from trainer.models.negatives import retrieval_batch
from trainer.models.sequence_padding import SequencePadding
from trainer.recording import RecordedObjective, Recording
from trainer.resolve import resolve

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
    model.train()
    stays = dict(list(model.tower.named_parameters())[::2]) if frozen else {}
    for parameter in stays.values():
        parameter.requires_grad_(False)
    expected = [gradients(model, batch) for batch in batches]
    plain = model.objective
    recorded = RecordedObjective(plain, padding, pool=None)
    model.objective = recorded
    for batch, (loss, found) in [*zip(batches, expected, strict=True)] * 2:
        padded_loss, padded = gradients(model, batch)
        torch.testing.assert_close(padded_loss, loss, rtol=1e-5, atol=1e-7)
        assert padded.keys() >= found.keys()
        assert stays.keys().isdisjoint(padded)
        for key, value in padded.items():
            torch.testing.assert_close(value, found.get(key, torch.zeros_like(value)), rtol=1e-4, atol=1e-6)


def trained(made: Any, name: str, *, pool: Any, steps: int) -> tuple[list[Tensor], list[Tensor]]:
    """Losses and parameters of some steps over batches of changing lengths, evaluation in between."""
    model, padding, batches = made(name)
    model.to(DEVICE).train()
    batches = [batch.to(DEVICE) for batch in batches]
    recorded = RecordedObjective(model.objective, padding, pool=pool)
    model.objective = recorded
    adam = torch.optim.Adam(model.tower.parameters(), lr=torch.tensor(1e-2, device=DEVICE), fused=True, capturable=True)
    tables = torch.optim.SGD(model.tables.parameters(), lr=0.1)
    losses = []

    def step_adam() -> None:
        adam.step()

    update = Recording("the update", step_adam, pool)
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
@pytest.mark.parametrize(("made", "name"), [*CASES, (ranker, "stochastic depth"), (retriever, "dropout")])
def test_200_replayed_steps_have_the_bits_of_launched_ones(made: Any, name: str) -> None:
    launched, replayed = (trained(made, name, pool=pool, steps=200) for pool in (None, torch.cuda.graph_pool_handle()))
    for which in (0, 1):
        assert all(torch.equal(x, y) for x, y in zip(launched[which], replayed[which], strict=True))
    assert len({float(loss) for loss in replayed[0]}) > 150


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_replayed_step_shows_nan_and_forgets_it() -> None:
    """A row that is not a number reaches the loss of its batch, and no later one."""
    model, padding, batches = ranker("paper")
    model.to(DEVICE).train()
    model.objective = RecordedObjective(model.objective, padding, pool=torch.cuda.graph_pool_handle())
    table = next(model.tables.parameters())
    before = table.detach().clone()
    losses = []
    for step in range(6):
        with torch.no_grad():
            table.copy_(torch.full_like(before, torch.nan) if step == 4 else before)
        losses.append(gradients(model, batches[0].to(DEVICE))[0])
    assert losses[4].isnan()
    assert all(torch.equal(losses[0], loss) for loss in (*losses[:4], losses[5]))


@pytest.mark.parametrize("must", [True, False])
def test_what_cannot_be_recorded_is_an_error_or_launched(
    must: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """recorded=on and recorded=auto."""

    def fail(_: Recording) -> None:
        raise RuntimeError("the step cannot be recorded (recorded=off launches it): unsupported")

    monkeypatch.setattr(Recording, "_record", fail)
    calls: list[int] = []
    step = Recording("the step", lambda: calls.append(1), pool="memory", must=must)
    step()
    if must:
        with pytest.raises(RuntimeError, match="the step cannot be recorded"):
            step()
        return
    step()
    step()
    assert len(calls) == 3 and caplog.text.count("it is launched from now on") == 1
