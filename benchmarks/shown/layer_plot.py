"""Draws benchmarks/results/layer.svg: time of a layer by length, where it goes, and whole towers.

Run: python -m benchmarks.shown.layer_plot [--layer FILE] [--tower FILE] [--svg FILE] on what `benchmarks.layer` and
`benchmarks.tower` saved.  Needs nothing but the standard library.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from benchmarks.shown.svg import line, text

RESULTS = Path("benchmarks/results")
COLOURS = {"full causal": "#444444", "semi-local 256 + 256": "#d95f02"}
KINDS = {"attention": "#d95f02", "products": "#7570b3", "elementwise and the rest": "#1b9e77"}
HEIGHT, TOP, SIDE, TALL = 420, 40, 250, 300
LEFTS = (60, 400, 750)


def main() -> None:
    """Reads both results and writes the picture."""
    parser = argparse.ArgumentParser(description="Draw a layer's time, its parts, and towers.")
    parser.add_argument("--layer", type=Path, default=RESULTS / "layer_h100.json")
    parser.add_argument("--tower", type=Path, default=RESULTS / "tower_h100.json")
    parser.add_argument("--svg", type=Path, default=RESULTS / "layer.svg")
    arguments = parser.parse_args()
    layer, tower = (json.loads(path.read_text()) for path in (arguments.layer, arguments.tower))
    arguments.svg.write_text(draw(layer, tower))


def draw(layer: dict[str, Any], tower: dict[str, Any]) -> str:
    """Three panels side by side."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="1180" height="{HEIGHT}" font-family="sans-serif" '
        'font-size="12"><rect width="100%" height="100%" fill="white"/>',
        lengths_panel(layer["lengths"]),
        breakdown_panel(layer["breakdown"]),
        tower_panel(tower["rows"]),
        f'<text x="60" y="{HEIGHT - 8}" fill="#666">{layer["gpu"]}, {layer["tokens"]} tokens, width 512, 4 heads '
        "of 128, bfloat16; solid: forward and backward, dashed: forward</text></svg>\n",
    ]
    return "\n".join(parts)


def lengths_panel(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Milliseconds a layer against length, both axes logarithmic."""
    lengths = sorted(int(length) for length in next(iter(results.values())))
    times = [row[key] for rows in results.values() for row in rows.values() for key in ("forward_ms", "train_ms")]
    low, high = math.log10(min(times)) - 0.1, math.log10(max(times)) + 0.1
    left = LEFTS[0]

    def x_of(length: int) -> float:
        return left + SIDE * math.log(length / lengths[0]) / math.log(lengths[-1] / lengths[0])

    def y_of(ms: float) -> float:
        return TOP + TALL * (high - math.log10(ms)) / (high - low)

    parts = [text(left + SIDE / 2, TOP - 14, "one layer, ms", size=14)]
    parts += [text(x_of(length), TOP + TALL + 16, f"{length // 1024}K") for length in lengths]
    for ms in (0.3, 1, 3, 10, 30, 100, 300):
        if low <= math.log10(ms) <= high:
            parts.append(text(left - 18, y_of(ms) + 4, f"{ms:g}"))
            parts.append(line(left, y_of(ms), left + SIDE, y_of(ms), "#ddd"))
    for place, (name, colour) in enumerate(COLOURS.items()):
        for key, dash in (("forward_ms", "6 4"), ("train_ms", "")):
            points = " ".join(f"{x_of(n):.1f},{y_of(results[name][str(n)][key]):.1f}" for n in lengths)
            parts.append(
                f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2.5" '
                f'stroke-dasharray="{dash}"/>'
            )
        parts.append(text(left + 8, TOP + 14 + 16 * place, name, anchor="start", colour=colour))
    rows = [row for each in results.values() for row in each.values()]
    kept, peak = (max(row[key] for row in rows) for key in ("kept_gib", "peak_gib"))
    words = f"memory at any length: at most {kept:.3f} GiB kept a layer, {peak:.2f} GiB at the peak of two layers"
    parts.append(text(left, TOP + TALL + 54, words, anchor="start", colour="#666"))
    return "".join(parts)


def breakdown_panel(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Stacked bars of milliseconds a layer, forward and backward, by kernel class."""
    highest = max(sum(result["classes"].values()) for result in results.values())
    left, parts = LEFTS[1], [text(LEFTS[1] + SIDE / 2, TOP - 14, "where a training layer's time goes, ms", size=14)]
    for index, (name, result) in enumerate(results.items()):
        x, bottom = left + 20 + 120 * index, float(TOP + TALL)
        for kind, colour in KINDS.items():
            tall = TALL * result["classes"].get(kind, 0.0) / highest
            bottom -= tall
            parts.append(f'<rect x="{x}" y="{bottom:.1f}" width="70" height="{tall:.1f}" fill="{colour}"/>')
            parts.append(text(x + 35, bottom + tall / 2 + 4, f"{result['classes'].get(kind, 0.0):.2f}", colour="white"))
        parts.append(text(x + 35, TOP + TALL + 16, name))
    parts += [
        text(left + 60 * index, TOP + TALL + 36, kind.split()[0], anchor="start", colour=colour)
        for index, (kind, colour) in enumerate(KINDS.items())
    ]
    return "".join(parts)


def tower_panel(rows: dict[str, dict[str, float]]) -> str:
    """Samples a second of each tower over those of the first."""
    left = LEFTS[2]
    parts = [text(left + 190, TOP - 14, "18 layers, 16,384 events: samples a second over HSTU's", size=14)]
    highest = max(max(row["train_ratio"], row["score_ratio"]) for row in rows.values())
    for index, (name, row) in enumerate(rows.items()):
        y = TOP + 70 * index
        parts.append(text(left, y + 12, name, anchor="start"))
        for offset, (key, colour) in enumerate((("train_ratio", "#7570b3"), ("score_ratio", "#1b9e77"))):
            wide = 330 * row[key] / highest
            top = y + 18 + 18 * offset
            parts.append(f'<rect x="{left}" y="{top}" width="{wide:.1f}" height="15" fill="{colour}"/>')
            label = f"{key.split('_', maxsplit=1)[0]} {row[key]:.1f}x"
            parts.append(text(left + wide + 5, top + 12, label, anchor="start"))
    return "".join(parts)


if __name__ == "__main__":
    main()
