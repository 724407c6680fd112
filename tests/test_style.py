"""House rules that no linter checks (CONTRIBUTING.md): sizes, names, docstrings, what an `__init__` may hold."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("attention_kernels", "embeddings", "launch", "pipelines", "trainer")
FILES = sorted(file for folder in (*PACKAGES, "benchmarks", "tests") for file in (ROOT / folder).rglob("*.py"))

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_KERNEL_LINES = 150
"""Jitted kernels and their launchers: a kernel cannot be cut into pieces as freely."""

VAGUE = {"utils", "util", "helpers", "helper", "common", "misc"}


def _identifier(file: Path) -> str:
    return str(file.relative_to(ROOT))


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


@pytest.mark.parametrize("file", FILES, ids=_identifier)
def test_file(file: Path) -> None:
    text = file.read_text()
    tree = ast.parse(text)
    assert text.isascii(), "only ASCII"
    assert text.count("\n") <= MAX_FILE_LINES, f"{text.count(chr(10))} lines: one concept a file"
    assert ast.get_docstring(tree), "a module says what it is"
    limit = MAX_KERNEL_LINES if file.is_relative_to(ROOT / "attention_kernels") else MAX_FUNCTION_LINES
    for function in _functions(tree):
        assert function.end_lineno is not None
        length = function.end_lineno - function.lineno + 1
        assert length <= limit, f"{function.name} has {length} lines, the limit is {limit}"


@pytest.mark.parametrize("file", [f for f in FILES if f.name == "__init__.py"], ids=_identifier)
def test_init_holds_a_docstring_only(file: Path) -> None:
    if file.parent == ROOT / "attention_kernels":
        pytest.skip("exports the package's public functions")
    assert len(ast.parse(file.read_text()).body) == 1


def test_modules_are_named_by_their_concept() -> None:
    names = {file.stem for file in FILES} | {parent.name for file in FILES for parent in file.parents}
    assert names.isdisjoint(VAGUE)


def test_no_module_hides_one_of_the_standard_library() -> None:
    # `python FILE` puts the file's folder first on the path; a module `logging` there would be found by everyone.
    own = {file.stem for file in FILES if file.is_relative_to(ROOT) and file.stem not in ("__init__", "__main__")}
    assert own.isdisjoint(sys.stdlib_module_names)
