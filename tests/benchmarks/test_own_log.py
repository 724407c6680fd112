"""The made-up logs hold what they say."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.made_up.logs import KINDS
from benchmarks.own_log import merged


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_made_up_log_is_a_function_of_its_seed(kind: str) -> None:
    first, again, other = (KINDS[kind](3_000, seed) for seed in (0, 0, 1))
    assert first.equals(again)
    assert not first.equals(other)
    assert 2_500 < first.num_rows <= 3_100


@pytest.mark.parametrize(("kind", "key"), [("items", "item"), ("users", "user")])
def test_a_strong_effect_shows_in_the_spread_of_rates(kind: str, key: str) -> None:
    log = KINDS[kind](50_000, 0)
    spread = {}
    for name in ("item", "user"):
        ids, clicks = log[name].to_numpy(), log["click"].to_numpy()
        seen, clicked = np.bincount(ids), np.bincount(ids, weights=clicks)
        often = seen >= 50
        rates = clicked[often] / seen[often]
        # Beyond what chance alone spreads them.
        spread[name] = rates.var() - (rates * (1 - rates) / seen[often]).mean()
    assert spread[key] > 3 * spread["user" if key == "item" else "item"]


def test_a_funnel_has_one_action_an_event() -> None:
    log = KINDS["funnel"](5_000, 0)
    actions = np.stack([log[name].to_numpy() for name in ("view", "cart", "buy")])
    assert (actions.sum(axis=0) == 1).all()
    assert (actions.sum(axis=1) > 0).all()


def test_a_log_measured_again_takes_its_place(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_text(json.dumps(merged(file, [{"name": "a", "n": 1}, {"name": "b", "n": 2}])))
    assert [log["n"] for log in merged(file, [{"name": "a", "n": 3}])["logs"]] == [3, 2]
