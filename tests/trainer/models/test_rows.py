"""Columns as parts of tokens: numbers by value and bucket, ids, many ids, each in the tokens of its part alone."""

import pytest
import torch

from pipelines.selection import Feature
from tests.support.batches import NUM_ACTIONS, PLAY_S, batch_of, random_arrays, random_rows, small_selection
from trainer.models import rows
from trainer.models.config import InputConfig, NumberConfig
from trainer.models.encoding import InputEncoder
from trainer.models.rows import NumberEncoder

CONTEXT = ("user_id", "country")
WIDTHS = {"item": 12, "tab": 8, "user_id": 12, "country": 4}


def make_encoder() -> InputEncoder:
    torch.manual_seed(0)
    config = InputConfig(numbers={"play_s": NumberConfig(buckets=4)})
    selection = small_selection(CONTEXT, columns=True)
    return InputEncoder(selection, widths=WIDTHS, config=config, dim=16, num_actions=NUM_ACTIONS)


def test_what_the_model_knows_of_numbers_is_finite_and_saved() -> None:
    """Numbers with more and with fewer borders, and one without statistics, share a tensor that checkpoints hold."""
    encoder = make_encoder()
    state = encoder.state_dict()
    assert {name for name in state if name.endswith(("borders", "center", "scale"))} == {
        f"{part}.numbers.{name}" for part in ("of_events", "of_candidates") for name in ("borders", "center", "scale")
    }
    features = [
        Feature(name=name, parts=("event",), kind="number", space=None, statistics=statistics)
        for name, statistics in (("known", PLAY_S), ("unknown", None))
    ]
    numbers = NumberEncoder(features, config=InputConfig(), dim=8)
    assert all(value.isfinite().all() for value in numbers.state_dict().values())


def test_columns_enter_the_tokens_of_their_part_alone() -> None:
    """Numbers by value and bucket, one id, many ids: in events what events have, in candidates what candidates have."""
    encoder = make_encoder()
    arrays = random_arrays([5, 0, 9], [2, 3, 1], context_names=CONTEXT)
    selection = small_selection(CONTEXT, columns=True)
    embedded = random_rows(batch_of(arrays), WIDTHS)
    with torch.no_grad():
        tokens, layout = encoder(embedded, batch_of(arrays).inputs)
        parts = encoder.of_events, encoder.of_candidates
        encoder.of_events = encoder.of_candidates = None
        plain, _ = encoder(embedded, batch_of(arrays).inputs)
    assert [part.ids + tuple(part.numbers.names) for part in parts] == [
        (*(each for each in selection.features if each.name in ("tab", "tags")), "play_s"),
        ("price",),
    ]
    of_events, of_candidates = parts
    play_s = arrays["number/play_s"]
    known = ~play_s.isnan()
    logarithms = torch.log1p(torch.arange(0, 101, 10, dtype=torch.float64))
    value = torch.where(known, (torch.log1p(play_s) - logarithms.mean()) / logarithms.std(), 0)
    # Quarters of the quantiles 0, 10, ... 100.
    bucket = torch.where(known, 1 + sum((play_s >= border).long() for border in (20, 50, 80)), 0)
    lens = arrays["lens/tags"].tolist()
    pooled = [part.mean(0) if len(part) else torch.zeros(8) for part in embedded["tags"].values().split(lens)]
    columns = torch.cat(
        [embedded["tab"].values(), torch.stack(pooled), value.float()[:, None], known.float()[:, None]], dim=1
    )
    events = of_events.projection(columns) + of_events.numbers.vectors[bucket]
    price = arrays["number/price"]
    values = torch.where(price.isnan(), 0, torch.log1p(price.nan_to_num()) / 10)
    candidates = of_candidates.projection(torch.stack([values, (~price.isnan()).float()], dim=1))
    candidates = candidates + of_candidates.numbers.vectors[(~price.isnan()).long()]
    index, is_candidate = layout.index_T - len(CONTEXT), layout.index_T >= 2 + layout.history_lens[layout.user_T]
    expected = torch.zeros_like(tokens)
    expected[(index >= 0) & ~is_candidate] = events
    expected[is_candidate] = candidates
    torch.testing.assert_close(tokens - plain, expected, rtol=1e-4, atol=1e-5)


def test_input_settings_that_make_no_sense_are_refused() -> None:
    for wrong, message in (
        ({"buckets": 0}, "buckets must be at least 1"),
        ({"thresholds": (2.0, 1.0)}, "thresholds must rise"),
        ({"thresholds": (1.0,), "buckets": 3}, "buckets=3 has no effect with thresholds"),
    ):
        with pytest.raises(ValueError, match=message):
            NumberConfig(**wrong)
    with pytest.raises(ValueError, match=r"input.event must not name a column twice, got tab, tab"):
        InputConfig(event=("tab", "tab"))


def test_columns_that_are_filled_up_for_a_gpu_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = random_arrays([5, 0, 9], [2, 3, 1], context_names=CONTEXT)
    embedded = random_rows(batch_of(arrays), WIDTHS)
    found = []
    for columns in (1, 8):
        monkeypatch.setattr(rows, "missing_columns", lambda width, _, columns=columns: -width % columns)
        encoder = make_encoder()
        tokens, _ = encoder(embedded, batch_of(arrays).inputs)
        tokens.square().sum().backward()
        found.append([tokens.detach(), *(parameter.grad for parameter in encoder.parameters())])
    for plain, filled in zip(*found, strict=True):
        torch.testing.assert_close(filled, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("widths", [(16, 24), (32, 8, 40), (3, 16, 5), (20, 4, 12), (17,), (16, 16, 16, 1)])
@pytest.mark.parametrize("columns", [1, 8])
def test_parts_side_by_side_are_mapped_as_if_joined(
    widths: tuple[int, ...], columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients are those of one map of all columns; wide parts are not copied to be joined."""
    monkeypatch.setattr(rows, "missing_columns", lambda width, _: -width % columns)
    torch.manual_seed(0)
    linear = torch.nn.Linear(sum(widths), 16).double()
    parts = [torch.randn(7, width, dtype=torch.float64, requires_grad=True) for width in widths]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        found = rows.side_by_side(parts, linear)
    expected = linear(torch.cat(parts, dim=1))
    torch.testing.assert_close(found, expected)
    upstream, inputs = torch.randn_like(expected), [*parts, *linear.parameters()]
    for mine, plain in zip(*(torch.autograd.grad(x, inputs, upstream) for x in (found, expected)), strict=True):
        torch.testing.assert_close(mine, plain)
    of_parts = {x.data_ptr() for x in kept}
    assert all(part.data_ptr() in of_parts for part in parts if part.shape[1] > 8 and part.shape[1] % 8 == 0)
