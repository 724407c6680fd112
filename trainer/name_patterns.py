"""Patterns of the names that parts of a model have, as `tables/item` or `dense/layers.0.*`.

`*` stands for any characters.  Names are those that checkpoints give tensors (`trainer/checkpoint/__init__.py`).
"""

import re
from dataclasses import dataclass


def matches(pattern: str, name: str) -> bool:
    """Whether a whole name is one that the pattern means."""
    return _compiled(pattern).fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class Renaming:
    """`NAMES`, or `OLD=NEW` with as many `*` on both sides, each of which stands for the same characters on both."""

    old: str
    new: str

    def __call__(self, name: str) -> str | None:
        """The new name of an old one; None if the pattern does not mean it."""
        found = _compiled(self.old).fullmatch(name)
        if found is None:
            return None
        parts = self.new.split("*")
        return parts[0] + "".join(text + part for text, part in zip(found.groups(), parts[1:], strict=True))

    def __str__(self) -> str:
        return self.old if self.old == self.new else f"{self.old}={self.new}"


def renaming(text: str) -> Renaming:
    """Read one.

    Raises:
        ValueError: a side is empty, or the two have not as many `*`.
    """
    old, equals, new = text.partition("=")
    new = new if equals else old
    if not old or not new or old.count("*") != new.count("*"):
        raise ValueError(f"{text!r} must be NAMES, or OLD=NEW with as many * on both sides")
    return Renaming(old, new)


def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile("(.*)".join(re.escape(part) for part in pattern.split("*")))
