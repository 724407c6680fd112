"""Read sharding plans, and plan tables for clusters that need not be there; needs no torch but to measure a machine.

    python -m embeddings PLAN           print the plan of a file: placement, reasons, memory of each rank
    python -m embeddings OLD NEW        print what changes between two plans, and how many bytes of rows move
    python -m embeddings plan TABLES.json --machines h100-8,own.json --ranks 8..512
                                        which clusters hold some tables, how fast, for how much
    python -m embeddings probe --out MACHINE.json
                                        measure this machine for the planner (embeddings/measuring/probe.py)

`python -m trainer plan` makes files for the first two.  Exit status: 0 done, 1 no cluster holds the tables or
trains so many samples a day, 2 wrong use.
"""

import argparse
import json
import math
import os
import signal
import sys
from pathlib import Path

from embeddings.hardware import NODES
from embeddings.planning.capacity import Copies, clusters, rank_numbers, read_nodes, read_prices
from embeddings.planning.capacity_report import capacity_page, capacity_text
from embeddings.planning.demand import read_demand
from embeddings.planning.plan_file import parse_plan
from embeddings.planning.report import plan_differences, plan_report


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    try:
        commands = {"plan": plan_capacity, "probe": probe_machine}
        command = commands.get(arguments[0]) if arguments else None
        return show_plan(arguments) if command is None else command(arguments[1:])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def show_plan(arguments: list[str]) -> int:
    """Print one plan, or how two differ.

    Raises:
        ValueError: a file is no plan.
    """
    parser = argparse.ArgumentParser(
        prog="python -m embeddings",
        description="Print a sharding plan, or compare two.",
        epilog="`plan TABLES.json ...` plans for clusters, `probe --out MACHINE.json` measures this machine: --help "
        "behind either tells more.",
    )
    parser.add_argument("plan", type=Path, metavar="PLAN", help="a file that `python -m trainer plan --out` wrote")
    parser.add_argument("new", type=Path, nargs="?", metavar="NEW", help="print the differences to this plan")
    parsed = parser.parse_args(arguments)
    plan = parse_plan(parsed.plan)
    print(plan_report(plan) if parsed.new is None else plan_differences(plan, parse_plan(parsed.new)))
    return 0


def plan_capacity(arguments: list[str]) -> int:
    """Plan tables for clusters and print what comes out.

    Raises:
        ValueError: a wrong file or option.
    """
    parser = argparse.ArgumentParser(prog="python -m embeddings plan", description="Which clusters hold some tables.")
    parser.add_argument(
        "tables", type=Path, metavar="TABLES", help="the tables and lookups (embeddings/planning/demand.py)"
    )
    known = ", ".join(name for name, node in NODES.items() if node.gpus)
    parser.add_argument("--machines", required=True, metavar="NAME,...", help=f"{known}, or .json files of your own")
    parser.add_argument("--ranks", required=True, metavar="A..B", help="numbers of GPUs, doubling from A to B")
    parser.add_argument(
        "--copies", type=int, nargs="+", default=[1], metavar="N", help="groups of ranks that each hold all tables (2D)"
    )
    parser.add_argument(
        "--average-every", type=int, default=100, metavar="N", help="steps between averages of copies; default: 100"
    )
    parser.add_argument(
        "--samples-per-day", type=float, default=1e6, metavar="N", help="what a cluster has to train; default: 1e6"
    )
    parser.add_argument("--prices", type=Path, metavar="FILE", help="JSON: price of a node's hour by its name")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with every rank's memory")
    parsed = parser.parse_args(arguments)
    if not 0 < parsed.samples_per_day < math.inf:
        raise ValueError(f"--samples-per-day must be a number above 0, got {parsed.samples_per_day}")
    if parsed.html is not None and not parsed.html.parent.is_dir():
        raise ValueError(f"cannot write {parsed.html}: there is no folder {parsed.html.parent}")
    nodes = read_nodes(parsed.machines.split(","))
    found = clusters(
        read_demand(parsed.tables),
        nodes,
        rank_numbers(parsed.ranks),
        samples=parsed.samples_per_day,
        prices={} if parsed.prices is None else read_prices(parsed.prices, nodes),
        copies=[Copies(number=number, averaged_every=parsed.average_every) for number in dict.fromkeys(parsed.copies)],
        begin=_show_progress,
    )
    _show_progress("")
    print(capacity_text(found, parsed.samples_per_day))
    if parsed.html is not None:
        try:
            parsed.html.write_text(capacity_page(found, parsed.samples_per_day), encoding="utf-8")
        except OSError as error:
            raise ValueError(f"cannot write {parsed.html}: {error.strerror}") from error
    return 0 if any(cluster.keeps_up for cluster in found) else 1


def _show_progress(text: str) -> None:
    """On a terminal, one line that the next one takes the place of."""
    if sys.stderr.isatty():
        print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)


def probe_machine(arguments: list[str]) -> int:
    """Measure this machine and write its file.

    Raises:
        ValueError: the file cannot be written, or the machine was too busy to be measured.
    """
    parser = argparse.ArgumentParser(
        prog="python -m embeddings probe",
        description="Measure this machine for the planner.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="MACHINE.json", help="the file to write")
    out = parser.parse_args(arguments).out
    if not out.parent.is_dir():
        raise ValueError(f"cannot write {out}: there is no folder {out.parent}")
    # torch takes seconds to import, and the other commands do without.
    from embeddings.measuring.probe import machine_file, probe

    node = probe()
    text = json.dumps(machine_file(node), indent=1) + "\n"
    if os.environ.get("RANK", "0") == "0":
        out.write_text(text, encoding="utf-8")
        clusters_too = f"--machines {out}, or " if node.gpus else ""
        print(text + f"written to {out}; use it with {clusters_too}--set placement.machine={out}")
    return 0


if __name__ == "__main__":
    # A reader that has seen enough (`| head`) ends this process without a traceback.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    raise SystemExit(main(sys.argv[1:]))
