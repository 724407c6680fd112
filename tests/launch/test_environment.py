"""An interpreter that cannot run a job is refused before anything else of the project is imported."""

import ast
import re
import sys

import pytest

from launch.environment import LEAST, check_environment
from launch.workspace import ROOT


def test_this_one_can() -> None:
    check_environment()


def test_an_old_interpreter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 2))
    with pytest.raises(ValueError, match=r"on .* is Python 3\.9: name one of 3\.11 or newer with --python"):
        check_environment()


def test_an_old_interpreter_can_read_the_question() -> None:
    for file in ("launch/environment.py", "trainer/exit_status.py"):
        ast.parse((ROOT / file).read_text(), feature_version=(3, 6))


def test_the_least_version_is_that_of_the_package() -> None:
    assert re.findall(r"python_requires=\">=(.*)\"", (ROOT / "setup.py").read_text()) == [".".join(map(str, LEAST))]


def test_packages_that_are_missing_are_named() -> None:
    with pytest.raises(ValueError, match=r"on .* has no nowhere_1, nowhere_2: name an interpreter with --python"):
        check_environment(("numpy", "nowhere_1", "nowhere_2"))
