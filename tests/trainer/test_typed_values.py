"""Overrides and JSON round trips of configuration trees: strict, and with one clear line an error."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from embeddings.records import from_dict
from trainer.typed_values import ABSENT, apply_overrides, differences, to_dict


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    rate: float = 0.1
    window: int | None = 3
    kind: Literal["a", "b"] = "a"
    sizes: tuple[int, ...] = (1, 2)

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError(f"rate must be at least 0, got {self.rate}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Circle:
    kind: Literal["circle"] = "circle"
    radius: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Square:
    kind: Literal["square"] = "square"
    side: float = 1.0
    radius: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    name: str
    on: bool = False
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None
    shape: Circle | Square = field(default_factory=Circle)


CONFIG = Outer(name="x")


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("inner.rate=2", Inner(rate=2.0)),
        ("inner.window=null", Inner(window=None)),
        ("inner.kind=b", Inner(kind="b")),
        ("inner.sizes=[4]", Inner(sizes=(4,))),
    ],
)
def test_override_sets_the_typed_value(override: str, value: Inner) -> None:
    assert apply_overrides(CONFIG, [override]).inner == value


def test_an_optional_group_is_overridden_where_it_is_set() -> None:
    config = Outer(name="x", maybe=Inner())
    assert apply_overrides(config, ["maybe.rate=2"]).maybe == Inner(rate=2.0)
    assert apply_overrides(config, ["maybe=null"]).maybe is None
    assert apply_overrides(CONFIG, ['maybe={"rate": 2}', "maybe.window=4"]).maybe == Inner(rate=2.0, window=4)


def test_a_group_of_several_kinds_is_the_one_that_its_kind_names() -> None:
    square = apply_overrides(CONFIG, ['shape={"kind": "square", "radius": 2}', "shape.side=3"])
    assert square.shape == Square(radius=2.0, side=3.0)
    assert from_dict(Outer, to_dict(square)) == square
    assert apply_overrides(CONFIG, ["shape.radius=4"]).shape == Circle(radius=4.0)
    assert apply_overrides(CONFIG, ["shape.radius=4", "shape.kind=square"]).shape == Square(radius=4.0)


def test_text_needs_no_quotes_and_may_hold_an_equals_sign() -> None:
    assert apply_overrides(CONFIG, ["name=a=b"]).name == "a=b"
    assert apply_overrides(CONFIG, ["name=3"]).name == "3"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("inner.rat=1", "unknown key 'inner.rat'"),
        ("nothing=1", "unknown key 'nothing'"),
        ("name.x=1", "is a value, not a group"),
        ("inner=1", "names a group"),
        ("maybe.rate=1", "maybe is null here"),
        ("shape.side=1", r"unknown key 'shape.side': shape has kind, radius"),
        ("shape.kind=star", "'shape.kind' must be one of circle, square, got \"star\""),
        ('shape={"side": 1}', "'shape.kind' must be one of circle, square, got null"),
        ('shape={"kind": "square", "edge": 1}', r"unknown key 'shape.edge'"),
        ("shape=square", r"'shape' must be a group of keys \(Circle\) or a group of keys \(Square\), got \"square\""),
        ("inner.rate=fast", "'inner.rate' must be a number"),
        ("inner.rate=NaN", "'inner.rate' must be a finite number"),
        ("inner.rate=Infinity", "'inner.rate' must be a finite number"),
        ("inner.window=1.5", "'inner.window' must be an integer or null"),
        ("inner.kind=c", "'inner.kind' must be one of a, b"),
        ("inner.sizes=[1, true]", r"'inner.sizes\[1\]' must be an integer"),
        ("on=1", "'on' must be true or false"),
        ("inner.rate=-1", "rate must be at least 0"),
        ("inner.rate", "not of the form key=value"),
    ],
)
def test_bad_override_is_refused_in_one_line(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        apply_overrides(CONFIG, [override])
    assert "\n" not in str(error.value)


def test_dictionary_round_trip() -> None:
    config = Outer(name="y", on=True, maybe=Inner(sizes=()))
    assert from_dict(Outer, to_dict(config)) == config


def test_dictionary_with_a_missing_or_unknown_key_is_refused() -> None:
    with pytest.raises(ValueError, match="'name' is missing"):
        from_dict(Outer, {})
    with pytest.raises(ValueError, match=r"unknown key 'inner\.x'"):
        from_dict(Outer, {"name": "x", "inner": {"x": 1}})


def test_differences_are_named_by_dotted_key() -> None:
    changed = apply_overrides(CONFIG, ["inner.rate=1", "on=true"])
    assert differences(to_dict(CONFIG), to_dict(changed)) == [("inner.rate", 0.1, 1.0), ("on", False, True)]


def test_differences_tell_what_is_absent_from_null_and_look_into_lists() -> None:
    old: dict[str, object] = {"a": None, "parts": [{"x": 1}, {"x": 2}], "sizes": [1, 2]}
    new: dict[str, object] = {"b": None, "parts": [{"x": 1}, {"x": 3, "y": 0}], "sizes": [1, 3]}
    assert differences(old, new) == [
        ("a", None, ABSENT),
        ("b", ABSENT, None),
        ("parts[1].x", 2, 3),
        ("parts[1].y", ABSENT, 0),
        ("sizes", [1, 2], [1, 3]),
    ]
    assert differences(old, old) == []
    assert f"{ABSENT}" == "nothing"
