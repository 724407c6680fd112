"""The tables of README.md, docs/quality.md and docs/speed.md anew from the files under benchmarks/results.

Run: python -m benchmarks.quality_page

A table stands between `<!-- table NAME -->` and `<!-- end -->`.  One of quality has its file's name, and behind it
stands where, when and with which code its rows were run, as the file says.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import ablation, days, demo, own_log
from benchmarks.quality.curve import YAMBDA
from benchmarks.quality.lengths import LENGTH, SCORING
from benchmarks.quality.next_item import ML1M
from benchmarks.quality.rankers import ABLATION, HISTORIES, RANKING
from benchmarks.shown import speed_tables

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "quality.md", ROOT / "docs" / "speed.md")
RESULTS = ROOT / "benchmarks" / "results"
QUALITY: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "quality_ml1m": ML1M.table,
    "quality_ranking": RANKING.table,
    "quality_ranking_cpu": RANKING.table,
    "quality_ablation": ABLATION.table,
    "quality_length": LENGTH.table,
    "quality_scoring": SCORING.table,
    "quality_histories": HISTORIES.table,
    "quality_yambda": YAMBDA.table,
    "demo": demo.table,
    "days": days.table,
    "ablation": ablation.table,
    "own_log": own_log.table,
}
"""What makes each table of quality of its file."""


def shown(name: str, table: Callable[[Mapping[str, Any]], str]) -> str:
    """A table of quality and where it comes from."""
    report = json.loads((RESULTS / f"{name}.json").read_text())
    return f"{table(report)}\n\n{origin(report)}"


TABLES: Mapping[str, Callable[[], str]] = {
    **{name: partial(shown, name, table) for name, table in QUALITY.items()},
    "headline": speed_tables.headline,
    "attention": speed_tables.attention,
    "beside": speed_tables.beside,
    "beside_fp8": speed_tables.beside_fp8,
    "layer": speed_tables.layer,
    "tower": speed_tables.tower,
    "step": speed_tables.step,
    "recording": speed_tables.recording,
    "biases": speed_tables.biases,
}
"""What makes each table."""
_PLACE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    for file in PAGES:
        file.write_text(page(file.read_text()))


def page(text: str) -> str:
    """The page with each of its tables as the results have it.

    Raises:
        KeyError: it has a place for a table that is none of `TABLES`.
    """
    return _PLACE.sub(lambda place: f"{place[1]}\n{TABLES[place[2]]()}\n\n{place[3]}", text)


def origin(report: Any) -> str:
    """What a report says of where its figures were measured, at any depth.

    >>> origin({"rows": {"a": {"hardware": ["NVIDIA H200"], "date": "2026-11-29", "commit": ["80e40e770e+"]}}})
    '*Run on NVIDIA H200; 2026-11-29; commit 80e40e770e+ (+: with changes that were committed later).*'
    """
    hardware, dates, commits = (
        sorted({text for key in (name, f"cost_{name}") for text in _values(report, key)})
        for name in ("hardware", "date", "commit")
    )
    parts = [f"Run on {' and '.join(hardware)}", *dates]
    if commits:
        said = " (+: with changes that were committed later)" if any(each.endswith("+") for each in commits) else ""
        parts.append(f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}{said}")
    return f"*{'; '.join(parts)}.*"


def _values(report: Any, key: str) -> Iterator[str]:
    """Texts under a key, single or in lists, wherever it stands."""
    if isinstance(report, Mapping):
        found = report.get(key, [])
        yield from [found] if isinstance(found, str) else found
        report = list(report.values())
    if isinstance(report, list):
        for each in report:
            yield from _values(each, key)


if __name__ == "__main__":
    main()
