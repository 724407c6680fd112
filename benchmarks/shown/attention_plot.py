"""Draws benchmarks/results/attention.svg from the figures that `benchmarks.attention` saved.

Run: python -m benchmarks.shown.attention_plot [--json FILE] [--svg FILE].  Needs nothing but the standard library.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

COLOURS = {"full causal": "#444444", "local 256": "#1b9e77", "semi-local 256 + 256": "#d95f02"}
DASHES = {"ours": "", "cudnn": "2 3", "flex": "7 4"}
NAMES = {"ours": "Longview (SiLU)", "cudnn": "cuDNN (softmax)", "flex": "FlexAttention (softmax)"}
PANELS = ("forward", "backward")
WIDTH, HEIGHT, LEFT, TOP, SIDE, TALL = 900, 420, 60, 40, 340, 300


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw milliseconds against length, forward and backward.")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/attention_h200.json"))
    parser.add_argument("--svg", type=Path, default=Path("benchmarks/results/attention.svg"))
    arguments = parser.parse_args()
    arguments.svg.write_text(draw(json.loads(arguments.json.read_text())))


def draw(result: dict[str, Any]) -> str:
    """The picture: both axes logarithmic, one panel a direction."""
    rows = [row for row in result["rows"] if row["mask"] in COLOURS and row["kernel"] in DASHES]
    lengths = sorted({row["length"] for row in rows})
    times = [time_of(row, direction) for row in rows for direction in PANELS]
    low, high = math.floor(math.log10(min(times)) * 2) / 2, math.ceil(math.log10(max(times)) * 2) / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" '
        'font-size="12"><rect width="100%" height="100%" fill="white"/>'
    ]
    for i, direction in enumerate(PANELS):
        left = LEFT + i * (SIDE + 80)
        parts.append(axes(left, direction, lengths, low, high))
        for mask in COLOURS:
            for kernel in DASHES:
                line = sorted(
                    (row["length"], time_of(row, direction))
                    for row in rows
                    if row["mask"] == mask and row["kernel"] == kernel
                )
                points = " ".join(f"{x_of(left, n, lengths):.1f},{y_of(ms, low, high):.1f}" for n, ms in line)
                parts.append(
                    f'<polyline points="{points}" fill="none" stroke="{COLOURS[mask]}" '
                    f'stroke-width="{3 if kernel == "ours" else 1.5}" stroke-dasharray="{DASHES[kernel]}"/>'
                )
    hardware, shape = result["hardware"], result["shape"]
    parts.append(legend())
    parts.append(
        f'<text x="{LEFT}" y="{HEIGHT - 8}" fill="#666">{hardware["device"]}, {shape["tokens"]} tokens in sequences of '
        f"one length, {shape['heads']} heads of {shape['size']}, bfloat16, {hardware['date']}</text></svg>\n"
    )
    return "\n".join(parts)


def time_of(row: dict[str, Any], direction: str) -> float:
    """Milliseconds: the GPU's alone where they were measured, else of `do_bench`."""
    return float(row[f"{direction}_gpu_ms"] or row[f"{direction}_ms"])


def x_of(left: int, length: int, lengths: list[int]) -> float:
    return left + SIDE * math.log(length / lengths[0]) / math.log(lengths[-1] / lengths[0])


def y_of(ms: float, low: float, high: float) -> float:
    return TOP + TALL * (high - math.log10(ms)) / (high - low)


def axes(left: int, title: str, lengths: list[int], low: float, high: float) -> str:
    parts = [f'<text x="{left + SIDE / 2}" y="{TOP - 14}" text-anchor="middle" font-size="14">{title}, ms</text>']
    for length in lengths:
        x = x_of(left, length, lengths)
        label = f"{length // 1024}K"
        parts.append(f'<text x="{x:.1f}" y="{TOP + TALL + 16}" text-anchor="middle">{label}</text>')
        parts.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{TOP + TALL}" stroke="#eee"/>')
    for exponent in range(math.floor(low), math.ceil(high) + 1):
        for ms in (10**exponent, 3 * 10**exponent):
            if low <= math.log10(ms) <= high:
                y = y_of(ms, low, high)
                parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{ms:g}</text>')
                parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{left + SIDE}" y2="{y:.1f}" stroke="#ddd"/>')
    return "".join(parts)


def legend() -> str:
    parts, x = [], LEFT
    y = HEIGHT - 34
    entries = [(colour, "", 3.0, mask) for mask, colour in COLOURS.items()]
    entries += [("#444444", dash, 3.0 if name == "ours" else 1.5, NAMES[name]) for name, dash in DASHES.items()]
    for colour, dash, width, text in entries:
        parts.append(
            f'<line x1="{x}" y1="{y - 4}" x2="{x + 26}" y2="{y - 4}" stroke="{colour}" stroke-width="{width}" '
            f'stroke-dasharray="{dash}"/><text x="{x + 31}" y="{y}" font-size="11">{text}</text>'
        )
        x += 45 + 6 * len(text)
    return "".join(parts)


if __name__ == "__main__":
    main()
