"""The page of runs: what their files say stands in it, differences are marked, and it needs nothing else."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from trainer.command_line import run_command
from trainer.commands import app
from trainer.report.curves import MAX_POINTS, Axis

VOID = {"meta", "br", "hr", "img", "input", "link"}
CONFIG = {"name": "demo", "max_steps": 30, "seed": 1, "model": {"dim": 64, "channels": []}, "vocabularies": {}}
RANKS = [
    {"first": 0, "last": 2, "weight_bytes": 3 << 20, "optimizer_bytes": 1 << 20, "io_bytes": 0, "host_bytes": 0},
    {"first": 3, "last": 3, "weight_bytes": 6 << 20, "optimizer_bytes": 2 << 20, "io_bytes": 0, "host_bytes": 5 << 20},
]
PLAN = {
    "version": 5,
    "machine": {"world_size": 4, "local_world_size": 2, "compute_device": "cuda", "hbm_gib": 80.0},
    "load": {"samples_per_rank": 16, "ids_per_sample": {}},
    "reservation": {"fraction": 0.1, "fraction_bytes": 8 << 30, "dense_bytes": 0, "activation_bytes": 0},
    "exchange": {},
    "cached_part": 0.2,
    "tables": {
        "item": {
            "num_embeddings": 7495,
            "embedding_dim": 32,
            "dtype": "float32",
            "optimizer": "rowwise_adagrad",
            "sharding_type": "table_wise",
            "kernel": "fused",
            "ranks": [3],
        }
    },
    "ranks": [estimate | {"step_ms": 0.5 + estimate["first"]} for estimate in RANKS],
}


class Page(HTMLParser):
    """Checks that every tag is closed in its order, and keeps the rows of tables, tags and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[tuple[bool, list[str]]] = []
        """(whether the row stands out, its cells)."""
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append((dict(attrs).get("class") == "differs", []))
        if tag in ("td", "th"):
            self.rows[-1][1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][1][-1] += data

    def captions(self) -> list[str]:
        """The titles of plots."""
        labels = [attrs.get("aria-label") or "" for _, attrs in self.tags]
        return [label.removesuffix(" over steps") for label in labels if label.endswith(" over steps")]


def _lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def _run(folder: Path, steps: int = 3, plan: Any = PLAN, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    metrics = [
        {"step": 10 * n, "samples": 160 * n, "loss": 0.5 / n, "samples_per_s": 40.0, "step_ms": 25.0, "imbalance": 1.1}
        | {"imbalance_by_step": [1.1], "time": 1.7e9 + n, "world_size": 4, "waiting_ms": 2.0 * n}
        for n in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text(_lines(metrics))
    if plan is not None:
        (folder / "plan.json").write_text(json.dumps(plan))
    return folder


def _evaluation(step: int, auc: float | None) -> dict[str, Any]:
    found = {"ne/click": 0.9321, "auc/click": auc, "auc_95/click": 0.0123, "gauc/click": 0.6, "positives/click": 8142.0}
    return {"step": step, **found, "rmse/dwell": 3.25}


def _report(*runs: Path) -> Page:
    out = runs[0].parent / "page.html"
    assert run_command(app, ["report", *map(str, runs), "--out", str(out)]) == 0
    return Page(out.read_text(encoding="utf-8"))


def test_what_the_files_say_stands_in_the_page(tmp_path: Path) -> None:
    run, one = _run(tmp_path / "first"), {"ne/buy": 1.0, "positives/buy": 1.0}
    (run / "eval.jsonl").write_text(_lines([_evaluation(10, 0.61), {**_evaluation(30, 0.7654), **one}]))
    (run / "eval_data%2Ftoday.jsonl").write_text(_lines([_evaluation(30, None)]))
    part = {"part": "day-7", **_evaluation(20, 0.5812), "auc_baseline/click": 0.55}
    (run / "progressive.jsonl").write_text(_lines([part]))
    environment = {"devices": "4 x CPU", "versions": {"torch": "2.13.0", "triton": "3.6.0"}}
    (run / "environment.json").write_text(json.dumps(environment))
    page = _report(run)
    cells = [row for _, row in page.rows]
    assert ["first", "demo", "30", "480", "0.1667", "40", "-"] in cells
    assert ["click", "first", "30", "8,142", "0.9321", "0.7654 \u00b1 0.0123", "0.6000", "-"] in cells
    assert ["click", "first", "30", "8,142", "0.9321", "-", "0.6000", "-"] in cells
    assert ["buy", "first", "30", "1", "1.0000", "-", "-", "-"] in cells
    assert ["day-7", "first", "20", "0.9321", "0.5812", "0.5500", "3.2500"] in cells
    assert ["model.dim", "64"] in cells and ["model.channels", "[]"] in cells
    assert (
        ["versions", "torch 2.13.0, triton 3.6.0"] in cells
        and ["devices", "4 x CPU"] in cells
        and ["processes", "4"] in cells
    )
    assert ["item", "7,495", "32", "936.88 KiB", "table_wise", "fused", "3"] in cells
    assert "rank 3: rows 6.00 MiB, optimizer state 2.00 MiB, buffers 0" in page.text and "3.5 ms" in page.text
    assert "first, step 20: 0.25" in page.text
    # Numbers that this code does not know by name are drawn too; of evaluations, only what there is twice.
    assert page.captions()[:2] == ["loss", "samples/s"] and "waiting_ms" in page.captions()
    assert page.captions()[-3:] == ["NE of click", "AUC of click", "RMSE of dwell"]
    assert not {"imbalance_by_step", "time", "world_size"} & set(page.captions())


def test_runs_lie_over_each_other_and_differences_are_marked(tmp_path: Path) -> None:
    page = _report(_run(tmp_path / "a"), _run(tmp_path / "b", steps=2, seed=2, data={"path": "d"}))
    marked = [row for differs, row in page.rows if differs]
    assert ["seed", "1", "2"] in marked and ["data.path", "-", "d"] in marked
    assert not any(row[0] in ("model.dim", "name", "processes", "last logged step") for row in marked)
    curves = [attrs["class"] for tag, attrs in page.tags if tag == "path" and "curve" in (attrs.get("class") or "")]
    assert curves.count("curve c0") == curves.count("curve c1") == 1 + len(page.captions())
    assert "stands at step 20 of 30" in page.text


def test_runs_of_different_tasks_have_rows_for_what_they_measure(tmp_path: Path) -> None:
    ranker, retriever = _run(tmp_path / "ranker"), _run(tmp_path / "retriever")
    (ranker / "eval.jsonl").write_text(_lines([{"step": 30, "ne/click": 0.9321}]))
    (retriever / "eval.jsonl").write_text(_lines([{"step": 20, "hr@10": 0.2}, {"step": 30, "hr@10": 0.25}]))
    page = _report(ranker, retriever)
    found = [row for _, row in page.rows if row[0] in ("click", "all")]
    assert found == [["click", "ranker", "30", "0.9321", "-"], ["all", "retriever", "30", "-", "0.2500"]]
    assert "HR@10" in page.captions() and "NE of click" not in page.captions()


def test_the_page_loads_and_runs_nothing_and_has_a_dark_form(tmp_path: Path) -> None:
    page = _report(_run(tmp_path / "a"))
    assert not [attrs for _, attrs in page.tags if {"src", "href", "srcset", "onload"} & set(attrs)]
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.tags}
    assert "prefers-color-scheme:dark" in page.text and not re.search(r"https?:|url\(|@import", page.text)


def test_names_are_text_wherever_they_come_from(tmp_path: Path) -> None:
    odd = "<b>&\"'x"
    run = _run(tmp_path / odd, name=odd, plan=PLAN | {"tables": {odd: PLAN["tables"]["item"]}}, **{odd: odd})
    (run / "eval.jsonl").write_text(_lines([{"step": n, f"ne/{odd}": 0.5 * n} for n in (1, 2)]))
    page = _report(run)
    assert "b" not in {tag for tag, _ in page.tags}
    cells = [row for _, row in page.rows]
    assert [odd, odd] in cells and [odd, odd, "2", "1.0000"] in cells and f"NE of {odd}" in page.captions()
    assert any(row[0] == odd and row[1] == "7,495" for row in cells)


def test_a_line_that_a_running_job_has_not_finished_is_left_out_and_said(tmp_path: Path) -> None:
    run = _run(tmp_path / "a", plan=None)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "loss": 0.0')
    page = _report(run)
    assert "metrics.jsonl ends in the middle of a line, which is left out" in page.text
    assert "holds no plan.json" in page.text and "has not been evaluated yet" in page.text
    assert ["a", "demo", "30"] in [row[:3] for _, row in page.rows]


def test_a_plan_of_another_version_is_said_and_the_rest_is_shown(tmp_path: Path) -> None:
    page = _report(_run(tmp_path / "a", plan={"version": 1}))
    assert "its plan is not shown" in page.text and "loss" in page.captions()


def test_runs_of_one_folder_name_are_told_apart(tmp_path: Path) -> None:
    page = _report(_run(tmp_path / "x" / "run"), _run(tmp_path / "y" / "run"))
    names = {row[0] for _, row in page.rows}
    assert {str(tmp_path / "x" / "run"), str(tmp_path / "y" / "run")} <= names


def test_a_spike_of_a_long_curve_is_drawn(tmp_path: Path) -> None:
    run = _run(tmp_path / "a")
    losses = [{"step": n, "loss": 9.0 if n == 7777 else 1.0 + n % 2} for n in range(20_000)]
    (run / "metrics.jsonl").write_text(_lines(losses))
    curve, band = (
        [attrs["d"] or "" for tag, attrs in _report(run).tags if tag == "path" and attrs.get("class") == kind]
        for kind in ("curve c0", "band c0")
    )
    heights = [float(point.split()[1]) for point in band[0].strip("MZ").split("L")]
    assert sum(height == min(heights) for height in heights) == 1
    assert all(len(path.split("L")) <= MAX_POINTS for path in curve) and len(heights) <= 2 * MAX_POINTS


def test_what_is_a_share_has_a_straight_axis_and_what_explodes_a_logarithmic_one(tmp_path: Path) -> None:
    run = _run(tmp_path / "a")
    values = [(0.01, 1.0), (0.9, 1e300), (0.8, 2.0)]
    records = [{"step": n, "auc/click": share, "gradient_norm": norm} for n, (share, norm) in enumerate(values)]
    (run / "metrics.jsonl").write_text(_lines(records))
    page = _report(run)
    assert "norm of the dense gradients logarithmic" in page.text and "AUC of click logarithmic" not in page.text
    assert re.findall(r"e\+2\d\d", page.text) and not re.findall(r"e\+\d+G", page.text)


@pytest.mark.parametrize(
    "axis",
    [
        Axis(0, 1),
        Axis(-3e-5, 2e-5),
        Axis(0.18, 0.193),
        Axis(1, 3),
        Axis(0, 123456),
        Axis(2, 70, True),
        Axis(1e-7, 3, True),
    ],
)
def test_an_axis_has_a_few_labels_between_its_ends(axis: Axis) -> None:
    places = [axis.place(tick) for tick in axis.ticks()]
    assert 2 <= len(places) <= 7 and places == sorted(places) and places[0] >= -1e-9 and places[-1] <= 1 + 1e-9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nothing", "is no directory"),
        (lambda folder: folder, "holds no config.json"),
    ],
)
def test_what_is_no_run_yet_is_one_line_and_status_two(
    make: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = _run(tmp_path / "sound")
    out = tmp_path / "page.html"
    assert run_command(app, ["report", str(sound), str(make(tmp_path)), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not out.exists()


def test_a_run_that_ended_before_its_first_step_stands_beside_others_and_is_no_page_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    young, sound = _run(tmp_path / "young", steps=0, plan=None), _run(tmp_path / "sound")
    page = _report(young, sound)
    (row,) = [row for _, row in page.rows if row[:2] == ["young", "demo"]]
    assert row[2:6] == ["0", "-", "-", "-"] and "holds no logged step yet" in row[6]
    assert "sound, step 30: 0.166667" in page.text
    assert run_command(app, ["report", str(young), "--out", str(tmp_path / "alone.html")]) == 2
    assert "holds no logged step yet" in capsys.readouterr().err


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_said_and_the_rest_drawn(tmp_path: Path, value: float) -> None:
    run = _run(tmp_path / "spoilt")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[1] |= {"loss": value, "imbalance": value}
    (run / "metrics.jsonl").write_text(_lines([*lines, {**lines[2], "step": 40, "loss": value}]))
    page = _report(run)
    (row,) = [row for _, row in page.rows if row[:2] == ["spoilt", "demo"]]
    assert row[4] == str(value) and "its loss is not finite at step 20" in row[6]
    assert "spoilt, step 30: 0.166667" in page.text


def test_wrong_use_is_said_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = _run(tmp_path / "a")
    for arguments, message in (
        ([str(run), str(run)], "named twice"),
        ([str(run), "--out", str(tmp_path / "no" / "page.html")], "name a file in a folder that exists"),
        ([str(run)] * 33, "at most 32"),
        ([], "Missing argument"),
    ):
        assert run_command(app, ["report", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_it_needs_no_torch(tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "trainer", "report", str(_run(tmp_path / "a"))]
    done = subprocess.run([*command, "--out", str(tmp_path / "page.html")], capture_output=True, text=True, check=True)
    assert "trainer.report.page" in done.stderr and not re.search(r"\| +torch\b", done.stderr)


def test_baselines_and_what_training_measured_stand_beside_one_another(tmp_path: Path) -> None:
    run = _run(tmp_path / "first")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines, start=1):
        of_window = {"ne/click": 1.0 / number, "auc/click": 0.5 + number / 10, "calibration/click": 1.01}
        line |= of_window | {"lifetime_ne/click": 0.7171, "lifetime_auc/click": 0.6161, "data_wait": 0.25}
    (run / "metrics.jsonl").write_text(_lines(lines))
    (run / "eval.jsonl").write_text(_lines([_evaluation(30, 0.7654) | {"auc_baseline/click": 0.7111}]))
    page = _report(run)
    heads = [row for _, row in page.rows if row[:3] == ["label", "run", "step"]]
    assert ["label", "run", "step", "NE", "AUC"] in heads
    assert any(
        "AUC of the baseline" in head and head.index("AUC of the baseline") == head.index("AUC") + 1 for head in heads
    )
    cells = [row for _, row in page.rows]
    assert ["click", "first", "30", "0.7171", "0.6161"] in cells
    assert any({"0.7111", "0.7654 \u00b1 0.0123"} <= set(row) for row in cells)
    captions = page.captions()
    assert {"NE of click", "AUC of click", "time waited for data, of all"} <= set(captions)
    assert not any("lifetime" in caption or "calibration" in caption for caption in captions)
