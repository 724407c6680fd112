"""Draws benchmarks/results/placements.svg: a step's table time and peak memory, predicted against measured.

Run: python -m benchmarks.shown.placements_plot [--results FILE] [--svg FILE] on what `benchmarks.placements` saved.
Needs nothing but the standard library.
"""

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.shown.svg import line, text

RESULTS = Path("benchmarks/results")
SIDE, TOP, LEFTS = 300, 40, (60, 440)
COLOURS = {"in device memory": "#1b9e77", "cached": "#d95f02", "in host memory": "#7570b3"}


def main() -> None:
    """Reads the results and writes the picture."""
    parser = argparse.ArgumentParser(description="Draw predictions against measurements.")
    parser.add_argument("--results", type=Path, default=RESULTS / "placements.json")
    parser.add_argument("--svg", type=Path, default=RESULTS / "placements.svg")
    arguments = parser.parse_args()
    arguments.svg.write_text(draw(json.loads(arguments.results.read_text())), encoding="utf-8")


def draw(results: Mapping[str, Any]) -> str:
    """Two panels side by side: a point a case, on the diagonal where the prediction is right."""
    cases, errors = results["placements"]["cases"], results["placements"]["errors"]
    said = (
        f"{results['gpu']}, {len(cases)} placements, rates measured by the probe; median error of time "
        f"{errors['median_time_error']:.1%}, of memory {errors['median_memory_error']:.1%}; "
        f"{errors['pairs_in_order']:.1%} of pairs in the right order"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="780" height="{TOP + SIDE + 80}" font-family="sans-serif" '
        'font-size="12"><rect width="100%" height="100%" fill="white"/>',
        panel(cases, LEFTS[0], "ms of the GPU a step", ("measured_ms", "planned_ms"), (0.1, 0.3, 1, 3)),
        panel(cases, LEFTS[1], "GiB at the peak", ("peak_gib", "planned_gib"), (0.1, 1, 10, 40)),
        *(
            text(LEFTS[0] + 8, TOP + 16 + 16 * place, name, anchor="start", colour=colour)
            for place, (name, colour) in enumerate(COLOURS.items())
        ),
        text(LEFTS[0], TOP + SIDE + 64, said, anchor="start", colour="#666"),
    ]
    return "\n".join(parts) + "</svg>\n"


def panel(
    cases: Mapping[str, Mapping[str, float]],
    left: int,
    title: str,
    keys: tuple[str, str],
    ticks: tuple[float, ...],
) -> str:
    """Predicted (upwards) against measured (to the right), both logarithmic and of one scale."""
    values = [case[key] for case in cases.values() for key in keys]
    low, high = math.log10(min(values)) - 0.1, math.log10(max(values)) + 0.1

    def along(value: float) -> float:
        return SIDE * (math.log10(value) - low) / (high - low)

    parts = [text(left + SIDE / 2, TOP - 14, f"{title}: predicted against measured", size=14)]
    parts.append(line(left, TOP + SIDE, left + SIDE, TOP, "#888"))
    for tick in ticks:
        if low <= math.log10(tick) <= high:
            x, y = left + along(tick), TOP + SIDE - along(tick)
            parts += [line(x, TOP, x, TOP + SIDE, "#ddd"), line(left, y, left + SIDE, y, "#ddd")]
            parts += [text(x, TOP + SIDE + 16, f"{tick:g}"), text(left - 18, y + 4, f"{tick:g}")]
    for name, case in cases.items():
        x, y = left + along(case[keys[0]]), TOP + SIDE - along(case[keys[1]])
        colour = next((colour for words, colour in COLOURS.items() if words in name), COLOURS["in device memory"])
        label = f"{name}: measured {case[keys[0]]:.3g}, predicted {case[keys[1]]:.3g}"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"><title>{label}</title></circle>')
    return "".join(parts)


if __name__ == "__main__":
    main()
