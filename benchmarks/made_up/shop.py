"""A made-up shop's log as industry has them: 40 columns of ids and 10 of numbers, day after day.

Every day brings new users, new items, new keys of nearly every column and, for some items, new attributes.  What
decides an action is the item's brand, the user's taste for its category, and the surface that it was shown on.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

START, DAY = 1_704_067_200, 86_400
ACTIONS: Mapping[str, float] = {"click": -1.0, "like": -3.0, "buy": -4.0}
"""Log-odds of each for an average item, user and surface."""
EVENT_IDS, CANDIDATE_IDS, USER_IDS, ITEM_IDS, ITEM_LISTS = 9, 6, 3, 15, 5
EVENT_NUMBERS, CANDIDATE_NUMBERS, ITEM_NUMBERS = 5, 2, 3
GROWTH = 0.05
"""By which users and the catalogue grow a day; half as many items change their attributes."""
ACTIVE, EVENTS_A_DAY = 0.5, 6.0
MISSING = 0.05
"""Part of the values of events and candidates."""

SCHEMA = f"""
user = "customer"
item = "sku"
time = "at"
actions = {list(ACTIONS)}
[event]
{"".join(f'event_{n} = "event_{n}"{chr(10)}' for n in range(EVENT_IDS))}
{"".join(f'dwell_{n} = "number"{chr(10)}' for n in range(EVENT_NUMBERS))}
[candidate]
{"".join(f'shown_{n} = "shown_{n}"{chr(10)}' for n in range(CANDIDATE_IDS))}
{"".join(f'price_{n} = "number"{chr(10)}' for n in range(CANDIDATE_NUMBERS))}
[users]
files = "attributes/users.parquet"
[users.columns]
{"".join(f'user_{n} = "user_{n}"{chr(10)}' for n in range(USER_IDS))}
interests = ["attribute_1"]
[items]
files = "attributes/items.parquet"
[items.columns]
{"".join(f'attribute_{n} = "attribute_{n}"{chr(10)}' for n in range(ITEM_IDS))}
{"".join(f'list_{n} = ["tag_{n // 2}"]{chr(10)}' for n in range(ITEM_LISTS))}
{"".join(f'score_{n} = "number"{chr(10)}' for n in range(ITEM_NUMBERS))}
[spaces]
attribute_0 = {{ rows = 4000 }}
shown_5 = {{ rows = 1024, hash = true }}
"""
"""The item's id, 20 columns of items (5 of many ids), 9 of events, 6 of candidates, 4 of users.

`attribute_0` has room to grow, the tables of other spaces grow with their keys, `shown_5` is hashed; lists share
spaces, and users' interests are in one of items."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Day:
    """What one day delivers."""

    log: pa.Table
    """A row an event, in order of time."""
    users: pa.Table
    """Attributes of new users."""
    items: pa.Table
    """Attributes of new items, and of those that have changed."""


def shop_days(num_users: int, num_days: int, seed: int, *, changing: bool = True) -> list[Day]:
    """The first days of a shop that begins with so many users and a tenth as many items.

    Without `changing` items keep the attributes that they come with.
    """
    attributes = np.zeros((0, ITEM_IDS), dtype=np.int64)
    days, known_users = [], 0
    for day in range(num_days):
        draw = np.random.default_rng((seed, day))
        users, items = (int(size * (1 + GROWTH * day)) for size in (num_users, max(50, num_users // 10)))
        known_items = len(attributes)
        attributes = np.vstack([attributes, _single_ids(draw, items - known_items, day)])
        changed = draw.choice(known_items, int(known_items * GROWTH / 2) if changing else 0, replace=False)
        attributes[changed] = _single_ids(draw, len(changed), day)
        told = np.concatenate([np.sort(changed), np.arange(known_items, items)])
        log = _log(draw, day, users, attributes)
        days.append(
            Day(
                log=log,
                users=_user_table(draw, np.arange(known_users, users), day),
                items=_item_table(draw, told, attributes[told], day),
            )
        )
        known_users = users
    return days


def write_delivery(folder: Path, days: Sequence[Day]) -> Path:
    """Write these days as one delivery of a log; of attributes the newest count."""
    (folder / "attributes").mkdir(parents=True)
    for number, day in enumerate(days):
        pq.write_table(day.log, folder / f"log-{number}.parquet")
    for name, tables in (("users", [day.users for day in days]), ("items", [day.items for day in days])):
        pq.write_table(newest(tables), folder / "attributes" / f"{name}.parquet")
    return folder


def newest(tables: Iterable[pa.Table]) -> pa.Table:
    """The last row of each key, the first column."""
    table = pa.concat_tables(tables)
    keys = table.column(0).to_numpy(zero_copy_only=False)
    _, from_the_end = np.unique(keys[::-1].astype(str), return_index=True)
    return table.take(np.sort(len(keys) - 1 - from_the_end))


def _single_ids(draw: np.random.Generator, count: int, day: int) -> NDArray[np.int64]:
    """[count, ITEM_IDS]: attributes of items; later days know further values."""
    sizes = 20 * (1 + np.arange(ITEM_IDS)) * (10 + day)
    values: NDArray[np.int64] = (draw.random((count, ITEM_IDS)) ** 2 * sizes).astype(np.int64)
    return values


def _log(draw: np.random.Generator, day: int, num_users: int, attributes: NDArray[np.int64]) -> pa.Table:
    """A day's events: some of the users, each with few or many events, no two in one second."""
    active = np.flatnonzero(draw.random(num_users) < ACTIVE)
    sizes = np.minimum(200, 1 + draw.pareto(1.5, len(active)) * (EVENTS_A_DAY - 1) / 2).astype(np.int64)
    user = np.repeat(active, sizes)
    first = np.repeat(np.cumsum(sizes) - sizes, sizes)
    at = np.sort(draw.integers(0, DAY - 300, len(user)) + user * DAY) - user * DAY + np.arange(len(user)) - first
    # Newer items are shown more often.
    item = (len(attributes) * (1 - draw.random(len(user)) ** 2)).astype(np.int64)
    shown = draw.integers(0, 30 + 3 * day, (len(user), CANDIDATE_IDS))
    fits = (attributes[item, 1] + user) % 5 == 0
    lift = _effect(attributes[item, 0], 0) + _effect(shown[:, 0], 1) + 1.5 * fits
    taken = {
        name: (draw.random(len(user)) < 1 / (1 + np.exp(-(base + lift)))).astype(np.int8)
        for name, base in ACTIONS.items()
    }
    events = draw.integers(0, 50 + 5 * day, (len(user), EVENT_IDS))
    columns: dict[str, Any] = {"customer": _keys("c", user), "sku": _keys("s", item), "at": START + day * DAY + at}
    columns |= taken
    columns |= {f"event_{n}": _keys("e", events[:, n], missing=_some(draw, len(user))) for n in range(EVENT_IDS)}
    columns |= {f"shown_{n}": pa.array(shown[:, n], mask=_some(draw, len(user))) for n in range(CANDIDATE_IDS)}
    dwell = draw.lognormal(2.0, 1.0, (len(user), EVENT_NUMBERS)) * (1 + taken["click"])[:, None]
    columns |= {f"dwell_{n}": pa.array(dwell[:, n], mask=_some(draw, len(user))) for n in range(EVENT_NUMBERS)}
    price = draw.lognormal(3.0, 1.0, (len(user), CANDIDATE_NUMBERS))
    columns |= {f"price_{n}": pa.array(price[:, n], mask=_some(draw, len(user))) for n in range(CANDIDATE_NUMBERS)}
    return pa.table(columns).take(np.argsort(at, kind="stable"))


def _user_table(draw: np.random.Generator, users: NDArray[np.int64], day: int) -> pa.Table:
    values = draw.integers(0, 10 + day, (len(users), USER_IDS))
    columns = {"customer": _keys("c", users)}
    columns |= {f"user_{n}": _keys("u", values[:, n]) for n in range(USER_IDS)}
    return pa.table(columns | {"interests": _lists(draw, "a1-", len(users), 200 + 10 * day, 3)})


def _item_table(
    draw: np.random.Generator, items: NDArray[np.int64], attributes: NDArray[np.int64], day: int
) -> pa.Table:
    columns = {"sku": _keys("s", items)}
    columns |= {f"attribute_{n}": _keys(f"a{n}-", attributes[:, n]) for n in range(ITEM_IDS)}
    columns |= {f"list_{n}": _lists(draw, "t", len(items), 100 * (n // 2 + 1) + 10 * day, 5) for n in range(ITEM_LISTS)}
    return pa.table(columns | {f"score_{n}": pa.array(draw.normal(size=len(items))) for n in range(ITEM_NUMBERS)})


def _keys(prefix: str, ids: NDArray[np.int64], missing: NDArray[np.bool_] | None = None) -> pa.Array:
    """Keys as text."""
    return pa.array(np.char.add(prefix, ids.astype(str)).astype(object), type=pa.string(), mask=missing)


def _lists(draw: np.random.Generator, prefix: str, count: int, size: int, most: int) -> pa.Array:
    offsets = np.concatenate(([0], np.cumsum(draw.integers(0, most + 1, count)))).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, _keys(prefix, draw.integers(0, size, int(offsets[-1]))))


def _some(draw: np.random.Generator, count: int) -> NDArray[np.bool_]:
    return draw.random(count) < MISSING


def _effect(ids: NDArray[np.int64], stream: int) -> NDArray[np.float64]:
    """A normal effect of each id, the same every day."""
    effects = np.random.default_rng((99, stream)).normal(size=1 + int(ids.max(initial=0)))
    return np.asarray(effects[ids])
