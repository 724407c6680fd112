"""docs/quality.md: its tables anew from the files under benchmarks/results.

Run: python -m benchmarks.quality_page

A table stands between `<!-- table NAME -->` and `<!-- end -->`, where NAME is its file's; behind it, where, when and
with which code its rows were run, as the file says.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks import ablation, days, demo, own_log
from benchmarks.curve import YAMBDA
from benchmarks.lengths import LENGTH
from benchmarks.next_item import ML1M
from benchmarks.rankers import ABLATION, RANKING

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS = ROOT / "docs" / "quality.md", ROOT / "benchmarks" / "results"
TABLES: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "quality_ml1m": ML1M.table,
    "quality_ranking": RANKING.table,
    "quality_ranking_cpu": RANKING.table,
    "quality_ablation": ABLATION.table,
    "quality_length": LENGTH.table,
    "quality_yambda": YAMBDA.table,
    "demo": demo.table,
    "days": days.table,
    "ablation": ablation.table,
    "own_log": own_log.table,
}
"""What makes each table of its file."""
_PLACE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    PAGE.write_text(page(PAGE.read_text()))


def page(text: str) -> str:
    """The page with each of its tables as its file has it.

    Raises:
        KeyError: it has a place for a table that is none of `TABLES`.
    """
    return _PLACE.sub(lambda place: f"{place[1]}\n{shown(place[2])}\n\n{place[3]}", text)


def shown(name: str) -> str:
    """A table and where it comes from."""
    report = json.loads((RESULTS / f"{name}.json").read_text())
    return f"{TABLES[name](report)}\n\n{origin(report)}"


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
