"""Generated data: reproducible, of the stated lengths and skew, with labels that only old events explain."""

from dataclasses import replace

import numpy as np
import pytest

from pipelines.config import DataConfig, SyntheticConfig
from pipelines.reading.loader import build_loader
from pipelines.synthetic import LIKE, NUM_CLUSTERS, STRETCH, SyntheticSource

CONFIG = SyntheticConfig(num_users=500, num_items=1000, min_len=100, max_len=900, lag=64, noise=0.0)


@pytest.mark.parametrize("lengths", ["lognormal", "zipf", "constant"])
def test_lengths_stay_in_their_bounds_and_match_the_content(lengths: str) -> None:
    source = SyntheticSource(replace(CONFIG, lengths=lengths), "train")
    told = source.file_lengths(0).history
    found = np.concatenate([source.read(unit).history["item_id"].lens() for unit in range(len(source.unit_rows))])
    assert (told == found).all()
    assert source.info.splits["train"].history_events == told.sum()
    assert len(told) == 500
    assert told.min() >= 100
    assert told.max() <= 900
    assert (len(np.unique(told)) == 1) == (lengths == "constant")


def test_labels_follow_from_the_stretch_and_from_nothing_newer() -> None:
    source = SyntheticSource(CONFIG, "train")
    for unit in range(3):
        samples = source.read(unit)
        recent = []
        for row in range(64):
            start, end = samples.history["item_id"].offsets[row : row + 2]
            items = samples.history["item_id"].values[start:end]
            stretch = items[len(items) - 63 - STRETCH : len(items) - 63]
            assert len(set(stretch % NUM_CLUSTERS)) == 1
            favourite = stretch[0] % NUM_CLUSTERS
            candidates = slice(*samples.candidate["item_id"].offsets[row : row + 2])
            labels = samples.candidate["action"].values[candidates] & 1
            assert (labels == (samples.candidate["item_id"].values[candidates] % NUM_CLUSTERS == favourite)).all()
            newest = slice(end - 63, end)
            liked = samples.history["action"].values[newest] & LIKE > 0
            recent += (items[len(items) - 63 :][liked] % NUM_CLUSTERS == favourite).tolist()
        assert np.mean(recent) == pytest.approx(1 / NUM_CLUSTERS, abs=0.08)


def test_items_are_skewed_and_within_the_table_and_none_is_the_unknown_one() -> None:
    source = SyntheticSource(replace(CONFIG, item_exponent=1.2), "train")
    samples = source.read(0)
    counts = np.bincount(samples.history["item_id"].values, minlength=1001)
    assert len(counts) == source.info.spaces["item"].rows == 1001
    assert counts[1:11].sum() > 0.3 * counts.sum()
    assert counts[0] == 0 and min(samples.candidate["item_id"].values) > 0
    assert set(samples.scalars["segment"]) == set(range(1, source.info.spaces["segment"].rows))


def test_the_loader_streams_it_like_any_other_source() -> None:
    config = DataConfig(path="synthetic", synthetic=CONFIG, global_batch_size=64, max_history_len=256, num_epochs=2)
    batches = list(build_loader(config, split="train", rank=0, world_size=1))
    assert sum(batch.global_samples for batch in batches) == 1000
    again = list(build_loader(replace(config, reader_threads=0), split="train", rank=0, world_size=1))
    for ours, theirs in zip(batches, again, strict=True):
        assert (ours.inputs.features.values() == theirs.inputs.features.values()).all()
    evaluation = list(build_loader(config, split="eval", rank=0, world_size=1))
    assert sorted(user for batch in evaluation for user in batch.inputs.user_id.tolist()) == list(range(500, 550))


@pytest.mark.parametrize(("seen", "least", "most"), [(900, 0.9, 1.0), (63, 0.4, 0.62)])
def test_only_a_reader_of_old_events_can_tell_the_labels(seen: int, least: float, most: float) -> None:
    """The share of liked events in a candidate's cluster ranks candidates well, unless old events are cut off."""
    config = DataConfig(path="synthetic", synthetic=CONFIG, global_batch_size=500, max_history_len=seen)
    [batch] = list(build_loader(config, split="train", rank=0, world_size=1))
    inputs = batch.inputs
    items, actions = inputs.ids_host("item_id").numpy(), inputs.action.numpy()
    scores, labels = [], (batch.labels.action.numpy() & 1).astype(bool)
    event, candidate = 0, len(actions)
    for history, candidates in zip(inputs.history_lens.tolist(), inputs.num_candidates.tolist(), strict=True):
        liked = items[event : event + history][actions[event : event + history] & LIKE > 0] % NUM_CLUSTERS
        own = items[candidate : candidate + candidates] % NUM_CLUSTERS
        scores += ((liked[None] == own[:, None]).sum(1) / max(len(liked), 1)).tolist()
        event, candidate = event + history, candidate + candidates
    values = np.array(scores)
    wins = (values[labels][:, None] > values[~labels]) + 0.5 * (values[labels][:, None] == values[~labels])
    assert least <= wins.mean() <= most


def test_with_lags_of_their_own_a_history_shows_what_it_reaches_of_them() -> None:
    """Lags from 16 to 256 events; nothing older than a stretch, as long as its lag, is liked."""
    config = replace(CONFIG, lag=16, lag_until=256, lengths="constant", min_len=1)
    oldest = {}
    for length in (64, 512):
        source = SyntheticSource(replace(config, max_len=length), "train")
        actions = [source.read(unit).history["action"].values for unit in range(len(source.unit_rows))]
        liked = np.concatenate(actions).reshape(-1, length)[:, ::-1] & LIKE > 0
        oldest[length] = np.array([np.flatnonzero(row).max(initial=-1) for row in liked])
    lags = oldest[512] // 2 + 1
    assert 16 <= lags.min() < 20
    assert 220 < lags.max() <= 256
    assert 0.45 < (lags < 64).mean() < 0.55
    seen = lags < 64
    assert (oldest[64][seen] == np.minimum(oldest[512], 63)[seen]).all()
