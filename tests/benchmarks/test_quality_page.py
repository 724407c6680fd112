"""Documents show what is committed under benchmarks/results; README.md and docs/quality.md no figure besides."""

import json
import re

import pytest

from benchmarks import quality_page
from benchmarks.quality.tables import TABLES
from benchmarks.quality_page import PAGES, RESULTS, ROOT, origin, page

PLACE = re.compile(r"<!-- table (\w+) -->.*?<!-- end -->", re.DOTALL)


def test_pages_are_what_the_committed_results_make_of_them() -> None:
    texts = [file.read_text() for file in PAGES]
    assert [page(text) for text in texts] == texts, "run python -m benchmarks.quality_page"
    assert sorted(name for text in texts for name in PLACE.findall(text)) == sorted(quality_page.TABLES)


@pytest.mark.parametrize("name", ["README.md", "docs/quality.md"])
def test_no_figure_is_typed_by_hand(name: str) -> None:
    """What is measured here are fractions of one."""
    written = PLACE.sub("", (ROOT / name).read_text())
    assert re.findall(r"(?<![\w.])0?\.\d\d+", written) == []


@pytest.mark.parametrize("name", list(TABLES))
def test_every_committed_row_is_one_that_can_be_run(name: str) -> None:
    for file in RESULTS.glob(f"quality_{name}*.json"):
        report = json.loads(file.read_text())
        assert {row for each in report.get("logs", {"": report.get("rows")}).values() for row in each} <= set(
            TABLES[name].names
        )


def test_where_figures_come_from_is_found_at_any_depth() -> None:
    cells = [
        {"hardware": ["b"], "date": "2026-01-02", "commit": ["2+"], "seeds": [0]},
        {"cost_hardware": "a", "cost_commit": "1", "date": "2026-01-01", "hardware": [], "commit": []},
    ]
    said = "*Run on a and b; 2026-01-01; 2026-01-02; commits 1, 2+ (+: with changes that were committed later).*"
    assert origin({"rows": {"x": {"16": cells[0]}, "y": {"16": cells[1]}}}) == origin({"logs": cells}) == said
    assert origin({"hardware": "a"}) == "*Run on a.*"
