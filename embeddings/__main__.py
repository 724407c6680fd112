"""Read sharding plans, on any machine; needs no torch.

    python -m embeddings PLAN           print the plan of a file: placement, reasons, memory of each rank
    python -m embeddings OLD NEW        print what changes between two plans, and how many bytes of rows move

`python -m trainer plan` makes such files.  Exit status: 0 done, 2 wrong use.
"""

import argparse
import sys
from pathlib import Path

from embeddings.plan_file import parse_plan
from embeddings.report import plan_differences, plan_report


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m embeddings", description="Print a sharding plan, or compare two.")
    parser.add_argument("plan", type=Path, metavar="PLAN", help="a file that `python -m trainer plan --out` wrote")
    parser.add_argument("new", type=Path, nargs="?", metavar="NEW", help="print the differences to this plan")
    parsed = parser.parse_args(arguments)
    try:
        plan = parse_plan(parsed.plan)
        print(plan_report(plan) if parsed.new is None else plan_differences(plan, parse_plan(parsed.new)))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
