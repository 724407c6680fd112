"""Tables of quality: models on public data, each in a stated protocol, several seeds, from files to figures.

Run: python -m benchmarks.quality --table ml1m --source DIR --work DIR [--rows NAME ...] [--seeds 5] [--jobs 5]
     python -m benchmarks.quality --table ml1m --show

Tables are `ml1m` (`benchmarks.quality.next_item`), `ranking`, `ablation` and `histories` (`benchmarks.quality.rankers`,
whose --source holds a folder a publisher, `kuairand` and `movielens`), `length` and `scoring`
(`benchmarks.quality.lengths`) and `yambda` (`benchmarks.quality.curve`), which make their data.  The result goes to
benchmarks/results/quality_TABLE.json, where rows and seeds that were not run stay (`--first-seed 3 --seeds 2` adds two
to three), and from there to docs/quality.md (`benchmarks.quality_page`).  What is done under --work is used again.
Where `--limit-s` ends runs, what they had by then counts.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from benchmarks.quality.curve import YAMBDA, Curve
from benchmarks.quality.lengths import LENGTH, SCORING, Lengths
from benchmarks.quality.next_item import ML1M, NextItem
from benchmarks.quality.rankers import ABLATION, HISTORIES, RANKING, T_95, Rankers
from benchmarks.quality.trainings import Asked

RESULTS = Path("benchmarks/results")
TABLES: Mapping[str, NextItem | Rankers | Lengths | Curve] = {
    "ml1m": ML1M,
    "ranking": RANKING,
    "ablation": ABLATION,
    "histories": HISTORIES,
    "length": LENGTH,
    "scoring": SCORING,
    "yambda": YAMBDA,
}
"""Every table by name."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description="Models on public data, in a stated protocol."
    )
    parser.add_argument("--table", choices=list(TABLES), default="ml1m", help="which table")
    parser.add_argument("--source", type=Path, help="folder with the publisher's files; WORK/source if not given")
    parser.add_argument("--work", type=Path, help="folder for prepared data and runs")
    parser.add_argument("--rows", nargs="+", help="rows by name; all if not given")
    parser.add_argument("--orders", nargs="+", default=[], help="ml1m: orders of ties; all if not given")
    parser.add_argument("--logs", nargs="+", default=[], help="of rankers: logs by folder; all if not given")
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each row; 0 to choose the pass alone")
    parser.add_argument("--first-seed", type=int, default=0, help="of them")
    parser.add_argument("--last-pass", action="store_true", help="ml1m: choose no pass, the recipe's last one counts")
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side")
    parser.add_argument("--limit-s", type=float, help="seconds after which no run begins or goes on")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="over all rows' settings: for trials")
    parser.add_argument("--out", type=Path, help="where the result goes and the rest of it comes from")
    parser.add_argument("--show", action="store_true", help="print the table of the result, and do nothing else")
    arguments = parser.parse_args()
    named = TABLES[arguments.table]
    known = {
        "rows": named.names,
        "orders": named.orders if isinstance(named, NextItem) else (),
        "logs": tuple(log.folder for log in named.logs) if isinstance(named, Rankers) else (),
    }
    for flag, names in known.items():
        for given in getattr(arguments, flag) or ():
            if given not in names:
                has = f"has {'; '.join(names)}" if names else "has none"
                parser.error(f"--{flag} names {given!r}, but table {arguments.table} {has}: leave it out or name those")
    if not 0 <= arguments.seeds <= max(T_95) or arguments.jobs < 1:
        parser.error(
            f"--seeds must lie in 0 to {max(T_95)} and --jobs be at least 1, got {arguments.seeds} and {arguments.jobs}"
        )
    file = arguments.out or RESULTS / f"quality_{arguments.table}.json"
    report = json.loads(file.read_text()) if file.is_file() else {}
    if not arguments.show:
        if arguments.work is None:
            parser.error("--work is needed, unless --show is given")
        asked = Asked(
            source=arguments.source or arguments.work / "source",
            work=arguments.work,
            rows=tuple(arguments.rows or named.names),
            orders=tuple(arguments.orders),
            logs=tuple(arguments.logs),
            seeds=arguments.seeds,
            first_seed=arguments.first_seed,
            last_pass=arguments.last_pass,
            jobs=arguments.jobs,
            limit_s=arguments.limit_s,
            settings=tuple(arguments.set),
        )
        named.measure(asked, report)
        file.write_text(json.dumps(report, indent=1) + "\n")
    print(named.table(report))
