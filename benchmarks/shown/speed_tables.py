"""The tables of docs/speed.md, and the few figures of the README, from files under benchmarks/results.

What others' kernels and steps take stands in peers.json, with its source; every other figure is of a benchmark here.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.quality.next_item import ML1M

RESULTS = Path(__file__).resolve().parents[1] / "results"
SHOWN = (
    ("full causal", 2048),
    ("full causal", 8192),
    ("full causal", 16384),
    ("full causal", 65536),
    ("local 256", 2048),
    ("local 256", 16384),
    ("local 256", 65536),
    ("semi-local 256 + 256", 2048),
    ("semi-local 256 + 256", 16384),
    ("semi-local 256 + 256", 65536),
)
"""Masks and lengths of the attention table."""
LAYERS = {
    "d 512, L 4096, full causal": "d 512, L 4096, full causal",
    "d 512, L 16384, full causal": "d 512, L 16384, full causal",
    "d 512, L 16384, semi-local 256 + 256": "d 512, L 16384, local 256",
    "d 1024, L 4096, full causal": "d 1024, L 4096, full causal",
}
"""Our layers, and Meta's beside which each stands: their kernels have no global rows."""
ULTRA = "ULTRA: merged, semi-local, 1,024 events after layer 6"
HSTU = "HSTU: interleaved, full causal"
STEPS = {
    "HSTU": "HSTU, 32 histories of 4,096 events",
    "HSTU, nothing recomputed": "the same, nothing recomputed",
    "HSTU, Zipf lengths": "HSTU, 256 to 4,096 events by Zipf's law",
    "ULTRA": "ULTRA-HSTU, 16 histories of 16,384 events",
    "ULTRA, nothing recomputed": "the same, nothing recomputed",
    "DLRMv4": "DLRMv4, 256 samples of 2,663 tokens in the mean",
    "DLRMv4, rows in 16 bits, nothing recomputed": "the same, rows in 16 bits, nothing recomputed",
}
REPLAYED = {
    "retriever, 128 samples": "`movielens_retrieval`, 128 histories",
    "ULTRA, 16 samples": "`yambda_ultra`, 16 histories of 2,048 to 6,830 events",
    "ULTRA, 48 samples": "`yambda_ultra`, 48 histories",
}


def attention() -> str:
    """Milliseconds forward / backward by mask and length; with a window the GPU's alone, as the host takes longer."""
    found = {(row["kernel"], row["mask"], row["length"]): row for row in _read("attention_h200")["rows"]}
    found |= {("CUTLASS", row["mask"], row["length"]): row for row in _read("peers")["attention"]["CUTLASS"]}
    others = [
        [_ms(row) if (row := found.get((kernel, *case))) else "" for kernel in ("CUTLASS", "cudnn", "flex")]
        for case in SHOWN
    ]
    rows = [
        (mask, f"{length:,}", _ms(found["ours", mask, length], "" if mask == "full causal" else "_gpu"), *theirs)
        for (mask, length), theirs in zip(SHOWN, others, strict=True)
    ]
    return _table(("mask", "length", "Longview", "CUTLASS", "cuDNN", "FlexAttention"), rows)


def beside() -> str:
    """Milliseconds forward / backward of ours and of Meta's newest attention on one card, the GPU alone."""
    cases = _beside_meta().items()
    rows = [(mask, f"{n:,}", *(_ms(each[x], "_gpu") for x in ("ours", "meta"))) for (mask, n), each in cases]
    return _table(("mask", "length", "Longview", "Meta"), rows)


def _beside_meta() -> Mapping[tuple[str, int], Mapping[str, Mapping[str, float]]]:
    """By mask and length: by kernel, `ours` or `meta`, what the GPU took, measured in one run."""
    found: dict[tuple[str, int], dict[str, dict[str, float]]] = {}
    for row in _read("attention_peers_h200")["rows"]:
        if "mask" in row:
            # Meta's forward and backward stand in rows of their own; the later row is its forward with TMA.
            kernel = found.setdefault((row["mask"], row["length"]), {}).setdefault(row["kernel"].split(",")[0], {})
            kernel.update({key: row[key] for key in ("forward_gpu_ms", "backward_gpu_ms") if key in row})
    return found


def beside_fp8() -> str:
    """Milliseconds of a layer's forward, the GPU alone: ours in both types, and Meta's in FP8."""
    found: dict[int, dict[str, float]] = {}
    for row in _read("attention_peers_h200")["rows"]:
        if "row" in row:
            found.setdefault(row["length"], {})[row["kernel"]] = row["forward_gpu_ms"]
    ours = ("ours, variant=production, FP8", "ours, variant=production, bfloat16")
    named = (*ours, next(kernel for each in found.values() for kernel in each if kernel.startswith("meta")))
    rows = [(f"{n:,}", *(f"{each[kernel]:.2f}" for kernel in named)) for n, each in found.items()]
    return _table(("length", "Longview, FP8", "Longview, bfloat16", "Meta, FP8"), rows)


def layer() -> str:
    """Million token-layers a second, forward / training."""
    ours, theirs = _read("layer_h200")["peers"], _read("peers")["layer"]["Meta"]
    rows = [(name, _rates(ours[f"paper: {name}"]), _rates(theirs[other])) for name, other in LAYERS.items()]
    return _table(("layer", "Longview", "Meta"), rows)


def tower() -> str:
    """Samples a second of the two towers."""
    rows = _read("tower_h100")["rows"]
    measured = (("training", "train_samples_per_s"), ("scoring", "score_samples_per_s"))
    lines = []
    for what, key in measured:
        hstu, ultra = rows[HSTU][key], rows[ULTRA][key]
        lines.append((f"{what}, samples/s", f"{hstu:.1f}", f"{ultra:.1f}", f"{ultra / hstu:.1f}"))
    return _table(("", "HSTU", "ULTRA-HSTU", "ratio"), lines)


def step() -> str:
    """Whole training steps, ours and recsys-examples'."""
    rows = _read("step_recorded_h200")["rows"]
    lines = [
        (
            words,
            f"{rows[name]['step_ms']:.1f}",
            f"{rows[name]['events_per_s']:,.0f}",
            f"{rows[name]['samples_per_s']:,.0f}",
            f"{rows[name]['mfu']:.1%}",
            f"{rows[name]['peak_gib']:.0f}",
        )
        for name, words in STEPS.items()
    ]
    theirs = _read("peers")["step"]["recsys-examples"]
    lines.append(
        (
            "recsys-examples, H100, HSTU, histories of 4,096 tokens",
            "",
            f"{theirs['tokens_per_s']:,}",
            "",
            f"{theirs['mfu']:.1%}",
            "",
        )
    )
    return _table(("step", "ms", "events/s", "samples/s", "MFU", "GiB"), lines)


def recording() -> str:
    """Milliseconds of a step, launched and replayed."""
    rows = _read("recording_h200")["rows"]
    lines = [
        (words, *(f"{rows[f'{name}, {how}']['step_ms']:.1f}" for how in ("launched", "replayed")))
        for name, words in REPLAYED.items()
    ]
    return _table(("", "launched, ms", "replayed, ms"), lines)


def biases() -> str:
    """Milliseconds of kernels of a replayed step without relative biases and with them, and their ratio."""
    rows = _read("relative_bias_h200")["rows"]
    lines = []
    for name in ("ml1m_hstu", "ml1m_hstu_large", "ml1m_longview"):
        none = rows[f"{name}, none"]["kernels_ms"]
        measured = (rows.get(f"{name}, {kind}", {}).get("kernels_ms") for kind in ("new", "old"))
        with_ratio = ("" if ms is None else f"{ms:.2f} ({ms / none:.2f})" for ms in measured)
        lines.append((f"`{name}`", f"{none:.2f}", *with_ratio))
    return _table(("", "none", "in the kernels", "as PyTorch operations, before"), lines)


def headline() -> str:
    """The README's figures: one of each kind of work, beside the best of others."""
    peers, where = _read("peers"), ("semi-local 256 + 256", 16384)
    attended = _beside_meta()[where]
    (cutlass,) = (row for row in peers["attention"]["CUTLASS"] if (row["mask"], row["length"]) == where)
    fastest = {
        f"{way}_ms": min(attended["meta"][f"{way}_gpu_ms"], cutlass[f"{way}_ms"]) for way in ("forward", "backward")
    }
    layers, towers = _read("layer_h200")["peers"], _read("tower_h100")["rows"]
    whole, theirs = _read("step_recorded_h200")["rows"]["HSTU"], peers["step"]["recsys-examples"]
    # As much is left out of the ranking there as in the published one.
    films = _read("quality_ml1m")["rows"]["ml1m_longview, 199 films known"]["orders"]["gr"]["test"]
    published = next(row.published for row in ML1M.rows if row.name == "ml1m_longview")["gr"]
    name, rate = "d 512, L 16384, semi-local 256 + 256", "train_samples_per_s"
    rows = [
        (
            "semi-local attention, 16,384 events, H200: ms forward / backward",
            _ms(attended["ours"], "_gpu"),
            f"{_ms(fastest)} (the faster of Meta's Triton and FBGEMM's CUTLASS)",
        ),
        (
            "one such layer, training, H200: million tokens/s",
            f"{layers[f'paper: {name}']['train_mtokens']:.1f}",
            f"{peers['layer']['Meta'][LAYERS[name]]['train_mtokens']:.1f} (Meta's Triton, without global rows)",
        ),
        (
            "a whole HSTU step, 32 histories of 4,096 events: MFU",
            f"{whole['mfu']:.1%} (H200)",
            f"{theirs['mfu']:.1%} (NVIDIA recsys-examples, H100)",
        ),
        (
            "18 layers on 16,384 events, training, H100: samples/s",
            f"{towers[ULTRA][rate]:.0f} (ULTRA-HSTU)",
            f"{towers[HSTU][rate]:.1f} (HSTU, the same kernels)",
        ),
        (
            "MovieLens-1M, next film: HR@10 / NDCG@10",
            " / ".join(_fraction(mean(films[metric])) for metric in ("hr@10", "ndcg@10")),
            f"{' / '.join(map(_fraction, published))} (the best published)",
        ),
    ]
    return _table(("", "Longview", "others"), rows)


def _read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _ms(row: Mapping[str, float], of: str = "") -> str:
    return f"{row[f'forward{of}_ms']:.2f} / {row[f'backward{of}_ms']:.2f}"


def _rates(row: Mapping[str, float]) -> str:
    return f"{row['forward_mtokens']:.1f} / {row['train_mtokens']:.1f}"


def _fraction(value: float) -> str:
    return f"{value:.4f}".removeprefix("0")


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("|" + "".join(f" {cell} |" if cell else " |" for cell in line) for line in lines)
