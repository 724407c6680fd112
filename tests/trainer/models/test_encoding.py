"""Tokens against sums written out here, event by event."""

import math

import pytest
import torch

from attention_kernels.relative_bias import log_bucket
from tests.support.batches import batch_of, looked_up, random_arrays, small_selection
from trainer.models.config import InputConfig
from trainer.models.encoding import InputEncoder

HISTORY, CANDIDATES, CONTEXT = [5, 0, 9, 2], [2, 3, 1, 0], ("user_id", "country")
NUM_ACTIONS, NUM_POSITIONS, NUM_BUCKETS, DIM, ROW = 8, 6, 7, 16, 12


def make_encoder(*, interleave: bool, learned: bool, causal: bool) -> InputEncoder:
    torch.manual_seed(0)
    config = InputConfig(
        merge="interleave" if interleave else "add",
        candidate_action="learned" if learned else "zero",
        causal=causal,
        num_positions=NUM_POSITIONS,
        num_time_buckets=NUM_BUCKETS,
    )
    encoder = InputEncoder(
        small_selection(CONTEXT),
        widths=dict.fromkeys(("item", *CONTEXT), ROW),
        config=config,
        dim=DIM,
        num_actions=NUM_ACTIONS,
    )
    return encoder.requires_grad_(False)


def times() -> tuple[list[list[int]], list[list[int]]]:
    """Of histories and of candidates: distances from nothing to weeks, unknown times, and no known time at all."""
    histories = [[-1, 100, 100 + 86400, 5_000_000, 5_000_001], [], [-1, -1, 10, 11, 13, 40, 100, 200, 300], [-1, -1]]
    return histories, [[5_000_000, 9_000_000], [7, 8, -1], [299], []]


def time_row(time: int, newest: int, *, forward: bool) -> int:
    if time == -1 or newest == -1:
        return 0
    seconds = max(1, time - newest if forward else newest - time)
    return 1 + min(NUM_BUCKETS - 1, int(math.log(seconds) / 0.301))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("interleave", "learned"), [(False, False), (False, True), (True, False)])
def test_tokens_are_the_sums_of_item_action_position_and_time(interleave: bool, learned: bool, causal: bool) -> None:
    encoder = make_encoder(interleave=interleave, learned=learned, causal=causal)
    arrays = random_arrays(HISTORY, CANDIDATES, context_names=CONTEXT)
    histories, candidates = times()
    arrays["timestamp"] = torch.tensor([time for user in (*histories, *candidates) for time in user])
    rows = {"item_id": torch.randn(sum(HISTORY) + sum(CANDIDATES), ROW)}
    rows |= {f"sample.{name}": torch.randn(len(HISTORY), ROW) for name in CONTEXT}
    tokens, layout = encoder(looked_up(rows), batch_of(arrays).inputs)
    items = encoder.shared.projection(rows["item_id"])

    expected, event, candidate = [], 0, sum(HISTORY)
    for user, (h, c) in enumerate(zip(HISTORY, CANDIDATES, strict=True)):
        context = [encoder.context[i].projection(rows[f"sample.{CONTEXT[i]}"][user]) for i in range(2)]
        if encoder.context_vectors is not None:
            expected += [one + vector for one, vector in zip(context, encoder.context_vectors, strict=True)]
        newest = max(histories[user], default=-1)
        for place, stamp in enumerate(histories[user]):
            item, bits = items[event + place], int(arrays["action"][event + place])
            if causal:
                before = histories[user][place - 1] if place else -1
                when = encoder.position_vectors[min(1 + place, NUM_POSITIONS)]
                when = when + encoder.age_vectors[time_row(stamp, before, forward=True)]
            else:
                when = encoder.position_vectors[min(h - place, NUM_POSITIONS)]
                when = when + encoder.age_vectors[time_row(stamp, newest, forward=False)]
            on = [bit for bit in range(NUM_ACTIONS) if bits >> bit & 1]
            action = encoder.action_vectors[0] + sum(encoder.action_vectors[1 + bit] for bit in on)
            expected += [item + when, action + when] if interleave else [item + action + when]
        for place, stamp in enumerate(candidates[user]):
            item = items[candidate + place] + encoder.position_vectors[0]
            item = item + encoder.candidate_gap_vectors[time_row(stamp, newest, forward=True)]
            item = item + context[0] + context[1] if causal else item
            expected.append(item + encoder.candidate_action[0] if encoder.candidate_action is not None else item)
        event, candidate = event + h, candidate + c
    torch.testing.assert_close(tokens, torch.stack(expected), rtol=1e-5, atol=1e-6)
    factor = 2 if interleave else 1
    assert layout.history_lens.tolist() == layout.history_lens_host.tolist() == [factor * h for h in HISTORY]
    assert layout.num_candidates_host.tolist() == CANDIDATES and layout.num_context == (0 if causal else len(CONTEXT))


def test_time_buckets_are_logarithmic_and_bounded() -> None:
    seconds = torch.tensor([-5, 0, 1, 2, 60, 3600, 86400, 10**9])
    assert log_bucket(seconds, 128).tolist() == [0, 0, 0, 2, 13, 27, 37, 68]
    assert log_bucket(seconds, 20).tolist() == [0, 0, 0, 2, 13, 19, 19, 19]
