"""Commands in documents are ones that there are: every option exists, and none that is required is missing."""

import io
import re
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from embeddings.__main__ import main as embeddings_main
from launch.commands import app as launch_app
from pipelines.prepare.__main__ import main as prepare_main
from trainer.commands import app as trainer_app

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    path
    for pattern in ("README.md", "docs/*.md", "pipelines/prepare/*.md", "data/*/*.md")
    for path in ROOT.glob(pattern)
)
APPS = {"trainer": trainer_app, "launch": launch_app}
MAINS = {"embeddings": embeddings_main, "pipelines.prepare": prepare_main}
COMMAND = re.compile(r"python -m (trainer|launch|embeddings|pipelines\.prepare)[ \n]+([a-z_]+)([^`#|]*)")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")


def commands_of(text: str) -> list[tuple[str, str, str]]:
    """(package, command, what follows it) of each command line, from blocks of code and from code within a line."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    spans = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    return [match.groups() for each in (*lines, *spans) for match in COMMAND.finditer(each)]


@cache
def options_of(package: str, command: str) -> tuple[frozenset[str], frozenset[str]]:
    """(options that there are, those of them that must be given)."""
    if package in APPS:
        group: Any = typer.main.get_command(APPS[package])
        parameters = [each for each in group.commands[command].params if each.param_type_name == "option"]
        known = frozenset(name for each in parameters for name in (*each.opts, *each.secondary_opts))
        return known, frozenset(each.opts[0] for each in parameters if each.required)
    said = io.StringIO()
    with redirect_stdout(said), pytest.raises(SystemExit):
        MAINS[package]([command, "--help"])
    usage = said.getvalue().split("\n\n")[0]
    outside = re.sub(r"\[[^\[\]]*\]", "", re.sub(r"\[[^\[\]]*\]", "", usage))
    return frozenset(OPTION.findall(said.getvalue())), frozenset(OPTION.findall(outside))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_have_the_options_that_they_are_shown_with(document: Path) -> None:
    for package, command, rest in commands_of(document.read_text()):
        known, required = options_of(package, command)
        given = set(OPTION.findall(rest))
        assert given <= known, f"{package} {command} has no {sorted(given - known)}"
        # A command that is named without any option is no whole one.
        assert not given or required <= given, f"{package} {command} lacks {sorted(required - given)}: {rest}"


def test_commands_are_found_and_told_apart() -> None:
    text = (
        "`python -m trainer plan RECIPE --world-size 64`\n```\npython -m embeddings plan T.json \\\n  --ranks 8\n```\n"
    )
    assert [found[:2] for found in commands_of(text)] == [("embeddings", "plan"), ("trainer", "plan")]
    assert "--ranks" in commands_of(text)[0][2]
    assert options_of("embeddings", "plan")[1] == {"--machines", "--ranks"}
    assert "--world-size" in options_of("trainer", "plan")[1]
