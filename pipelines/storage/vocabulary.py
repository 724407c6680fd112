"""What ids mean: a digest of the keys behind them, by which data and runs tell whether they speak of the same items."""

from collections.abc import Iterable, Mapping
from hashlib import sha256

import numpy as np
import pyarrow as pa

from pipelines.features import DatasetInfo

DIGEST_LEN = 16
"""Characters of a digest, each 4 bits."""
ACTIONS = "event.action"
"""Under which the names of the actions stand among the digests, in the order of their bits; no space has a dot."""


def keys_digest(parts: Iterable[pa.Array]) -> str:
    """The digest of keys in the order of their ids, in any number of parts.

    Of the keys as text, so that it does not depend on how a file stores them, nor on its row groups.
    """
    lens, texts = sha256(), sha256()
    for keys in parts:
        values = (keys if pa.types.is_large_binary(keys.type) else keys.cast(pa.large_string())).cast(pa.large_binary())
        # Lengths apart from the text: "a", "bc" is not "ab", "c".
        offsets = np.frombuffer(values.buffers()[1], np.int64)[values.offset : values.offset + len(values) + 1]
        lens.update(np.diff(offsets).astype("<i8").tobytes())
        text = values.buffers()[2]
        if text is not None:
            texts.update(memoryview(text)[offsets[0] : offsets[-1]])
    return sha256(lens.digest() + texts.digest()).hexdigest()[:DIGEST_LEN]


def vocabularies(info: DatasetInfo) -> dict[str, str]:
    """The digest of each space that has one, and the names of the actions."""
    digests = {name: space.digest for name, space in info.spaces.items() if space.digest is not None}
    return {**digests, ACTIONS: ", ".join(info.actions)}


def earlier_digests(info: DatasetInfo, space: str) -> tuple[str, ...]:
    """Digests that a space had before keys were added to it, which changed no id."""
    return tuple(info.details.get("earlier_digests", {}).get(space, ()))


def grown_spaces(known: Mapping[str, str], info: DatasetInfo) -> set[str]:
    """Spaces to which keys were added since the digests `known`; the ids of earlier keys stayed."""
    return {name for name, digest in known.items() if digest in earlier_digests(info, name)}


def check_same_ids(known: Mapping[str, str], info: DatasetInfo, *, data: str, other: str) -> None:
    """Raise ValueError if ids or action bits of `data`, described by `info`, mean something else than to `other`.

    `known` holds the digests of `other`; spaces of which one side has no digest cannot be compared.
    """
    for name, digest in vocabularies(info).items():
        if name not in known or known[name] in (digest, *earlier_digests(info, name)):
            continue
        if name == ACTIONS:
            raise ValueError(
                f"the actions of {data} are {digest}, but those of {other} {known[name]}: a model knows them by their "
                "places; prepare the data with these, in this order"
            )
        raise ValueError(
            f"ids of the space {name!r} mean something else in {data} (digest {digest}) than in {other} (digest "
            f"{known[name]}): the keys were numbered anew; use data with the old numbers (--extend keeps them), "
            "or start another run with --init-from, which finds rows by their keys"
        )
