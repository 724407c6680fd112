"""Made-up logs of shops, of which the truth is known: what decides an action is an effect of the item, of the user, of
what the user looked at of late, or of how far the user has come with the product.

Each is a table with the columns user, item, at (seconds) and one column of 0 and 1 an action, in no particular order.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

START, DAYS, DAY = 1_700_000_000, 30, 86_400
EVENTS_A_USER, EVENTS_AN_ITEM = 40, 100
BASE_LOG_ODDS: Mapping[str, float] = {"click": -1.5, "like": -3.5, "buy": -5.0}
"""Log-odds of an action on an average item shown to an average user: 18%, 3% and 0.7%."""
NUM_INTERESTS, CHANGE_RATE, INTEREST_LOG_ODDS = 20, 0.03, 2.5


def items_log(num_events: int, seed: int) -> pa.Table:
    """Strong effects of items, weak ones of users; new items and users all the time."""
    generator = np.random.default_rng(seed)
    user, item, at = _impressions(generator, num_events)
    quality = _effects(generator, item, shared=0.9, own=0.8)
    taste = _effects(generator, user, shared=0.4, own=0.3)
    return _shown(generator, user, item, at, quality + taste)


def users_log(num_events: int, seed: int) -> pa.Table:
    """Strong effects of users, weak ones of items."""
    generator = np.random.default_rng(seed)
    user, item, at = _impressions(generator, num_events)
    quality = _effects(generator, item, shared=0.0, own=0.3)
    taste = _effects(generator, user, shared=1.0, own=0.8)
    return _shown(generator, user, item, at, quality + taste)


def interests_log(num_events: int, seed: int) -> pa.Table:
    """Strong effects of the sequence: a user is after one kind of item for a while, and acts on that kind."""
    generator = np.random.default_rng(seed)
    user, item, at = _impressions(generator, num_events)
    kind = generator.integers(NUM_INTERESTS, size=item.max() + 1)
    changes = np.append(True, user[1:] != user[:-1]) | (generator.random(len(user)) < CHANGE_RATE)
    since = np.maximum.accumulate(np.where(changes, np.arange(len(user)), 0))
    interest = generator.integers(NUM_INTERESTS, size=len(user))[since]
    # The shop knows a little of it.
    by_kind = np.argsort(kind, kind="stable")
    first, count = np.searchsorted(kind[by_kind], np.arange(NUM_INTERESTS)), np.bincount(kind, minlength=NUM_INTERESTS)
    fitting = by_kind[first[interest] + (generator.random(len(user)) * count[interest]).astype(np.int64)]
    item = np.where((generator.random(len(user)) < 0.3) & (count[interest] > 0), fitting, item)
    matches = kind[item] == interest
    effects = _effects(generator, item, shared=0.0, own=0.4) + _effects(generator, user, shared=0.0, own=0.3)
    return _shown(generator, user, item, at, effects - 0.8 + INTEREST_LOG_ODDS * matches[:, None])


def funnel_log(num_events: int, seed: int) -> pa.Table:
    """A product is viewed, put into the cart, and bought: each event is one action, on a new or a recent product."""
    generator = np.random.default_rng(seed)
    user, item, at = _impressions(generator, num_events)
    quality = generator.normal(size=item.max() + 1) * 0.7
    mood = generator.normal(size=user.max() + 1) * 0.6
    action = np.zeros(len(user), dtype=np.int64)
    again, draw, pick = (generator.random(len(user)) for _ in range(3))
    # Products that the user has viewed, and whether each lies in the cart.
    viewed: list[tuple[int, bool]] = []
    for event in range(len(user)):
        if event == 0 or user[event] != user[event - 1]:
            viewed = []
        if not viewed or again[event] > 0.35:
            viewed.append((int(item[event]), False))
            continue
        place = len(viewed) - 1 - int(pick[event] * min(5, len(viewed)))
        item[event], in_cart = viewed[place]
        odds = np.exp((-0.3 if in_cart else -1.0) + quality[item[event]] + mood[user[event]])
        if draw[event] < odds / (1 + odds):
            action[event] = 2 if in_cart else 1
            viewed[place] = (int(item[event]), not in_cart)
    columns = {name: (action == place).astype(np.int8) for place, name in enumerate(("view", "cart", "buy"))}
    return _table(generator, user, item, at, columns)


KINDS: Mapping[str, Callable[[int, int], pa.Table]] = {
    "items": items_log,
    "users": users_log,
    "interests": interests_log,
    "funnel": funnel_log,
}
"""Every kind by name."""


def _impressions(generator: np.random.Generator, num_events: int) -> tuple[IntArray, IntArray, IntArray]:
    """(user, item, time) of what was shown: users one after another, each one's events in order of time.

    Users come over the first 18 days and differ much in how active they are; half of the items appear some time on.
    """
    num_users, num_items = max(20, num_events // EVENTS_A_USER), max(100, num_events // EVENTS_AN_ITEM)
    activity = generator.gamma(0.7, size=num_users)
    user = np.repeat(np.arange(num_users), np.maximum(2, (activity / activity.sum() * num_events).astype(np.int64)))
    joined = generator.random(num_users) * 0.6
    day = (joined[user] + generator.random(len(user)) * (1 - joined[user])) * DAYS
    day = day[np.lexsort((day, user))]
    popularity = generator.permutation((np.arange(num_items) + 1.0) ** -0.9)
    appears = np.where(generator.random(num_items) < 0.5, 0.0, generator.random(num_items) * DAYS)
    cumulative = np.cumsum(popularity / popularity.sum())
    item = np.zeros(len(user), dtype=np.int64)
    wrong = np.arange(len(user))
    while len(wrong):
        drawn = np.searchsorted(cumulative, generator.random(len(wrong)))
        item[wrong] = np.minimum(drawn, num_items - 1)
        wrong = wrong[appears[item[wrong]] > day[wrong]]
    return user, item, START + (day * DAY).astype(np.int64)


def _effects(generator: np.random.Generator, ids: IntArray, *, shared: float, own: float) -> FloatArray:
    """[events, actions] what an id adds to the log-odds: a part for all actions alike, and one of each action."""
    size = int(ids.max()) + 1
    effects: FloatArray = shared * generator.normal(size=(size, 1)) + own * generator.normal(
        size=(size, len(BASE_LOG_ODDS))
    )
    return effects[ids]


def _shown(
    generator: np.random.Generator, user: IntArray, item: IntArray, at: IntArray, effects: FloatArray
) -> pa.Table:
    """What users did of what they were shown, given what is added to each action's log-odds."""
    log_odds = np.array(list(BASE_LOG_ODDS.values())) + effects
    taken = generator.random(log_odds.shape) < 1 / (1 + np.exp(-log_odds))
    columns = {name: taken[:, place].astype(np.int8) for place, name in enumerate(BASE_LOG_ODDS)}
    return _table(generator, user, item, at, columns)


def _table(
    generator: np.random.Generator,
    user: IntArray,
    item: IntArray,
    at: IntArray,
    actions: Mapping[str, NDArray[np.int8]],
) -> pa.Table:
    order = generator.permutation(len(user))
    columns: dict[str, NDArray[Any]] = {"user": user, "item": item, "at": at, **actions}
    return pa.table({name: values[order] for name, values in columns.items()})
