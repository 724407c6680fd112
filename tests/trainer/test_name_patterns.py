"""Patterns of names: what they mean, and what a renaming makes of it."""

import pytest

from trainer.name_patterns import matches, renaming


def test_a_star_is_any_characters_and_nothing_else_is_special() -> None:
    assert matches("tables/item", "tables/item")
    assert matches("dense/layers.0.*", "dense/layers.0.norm.weight")
    assert matches("*", "")
    for pattern, name in (
        ("tables/item", "tables/items"),
        ("tables/item", "xtables/item"),
        ("dense/layers.0.*", "dense/layers.01norm"),
        ("dense/[ab]", "dense/a"),
        ("dense/a?", "dense/ab"),
    ):
        assert not matches(pattern, name), (pattern, name)


def test_stars_stand_for_the_same_on_both_sides() -> None:
    assert renaming("dense*/layers.0.*=dense*/layers.2.*")("dense_optimizer/layers.0.w/step") == (
        "dense_optimizer/layers.2.w/step"
    )
    assert renaming("tables/video=tables/item")("tables/video") == "tables/item"
    assert renaming("tables/video=tables/item")("tables/videos") is None
    assert renaming("tables/*")("tables/item") == "tables/item"


@pytest.mark.parametrize("text", ["", "=", "a=", "=a", "a*=b", "a=b*"])
def test_a_renaming_without_a_meaning_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be NAMES, or OLD=NEW"):
        renaming(text)
