"""Does a run resume from the image of its file system at any moment, as a power cut leaves it?

Run, as root: python -m benchmarks.crash_images [--images 100] [--resumes 5] [--seed 0] [--json FILE]

A run trains on an ext4 file system in a file of a btrfs one, both through loop devices.  At random moments the file is
cloned, which takes every block as it is at that moment, while the training goes on.  Each image is then mounted, which
replays its journal as a restart of the machine does, and must hold whole every checkpoint that counts, the newest that
the run had called complete, and a line of metrics for every step up to it.  Some are gone on from, bit for bit.
"""

import argparse
import datetime
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.crash.campaign import SETTINGS
from benchmarks.crash.small_disks import make_image, mounted, run_tool
from trainer.checkpoint.catalogue import open_catalogue
from trainer.run.run_dir import RunDir

STEPS = 1_000_000
MORE = 20
"""Steps that a run takes from an image."""


def train(run_dir: Path, steps: int) -> "subprocess.Popen[str]":
    """Two ranks; their output is a pipe."""
    settings = [f"max_steps={steps}" if setting.startswith("max_steps") else setting for setting in SETTINGS]
    settings += ["data.num_epochs=100000", "schedule.kind=constant", f"evaluation.every_steps={STEPS}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.Popen(
        [*torchrun, "-m", "trainer", "train", "kuairand_sample", "--run-dir", str(run_dir), "--set", *settings],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def losses(run_dir: Path) -> dict[int, float]:
    """Loss by step of the whole lines."""
    text = (run_dir / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return {line["step"]: line["loss"] for line in lines}


def take_images(source: Path, run_dir: Path, folder: Path, count: int, chance: random.Random) -> dict[int, float]:
    """Clone `source` at random moments of a run in it; returns the losses of the whole run.

    Beside image-N.img, image-N.step holds the newest step that the run had called complete before it was taken.
    """
    process = train(run_dir, STEPS)
    log = run_dir / "logs" / "rank-0.log"
    while _complete(log) == 0:
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.05)
    for number in range(count):
        time.sleep(chance.uniform(0.0, 0.8))
        step = _complete(log)
        run_tool("cp", "--reflink=always", str(source), str(folder / f"image-{number}.img"))
        (folder / f"image-{number}.step").write_text(str(step))
    process.terminate()
    process.communicate()
    return losses(run_dir)


def _complete(log: Path) -> int:
    found = re.findall(r"checkpoint of step (\d+) is complete", log.read_text()) if log.exists() else []
    return int(found[-1]) if found else 0


def check_image(run_dir: Path, called_complete: int, expected: dict[int, float]) -> dict[str, int]:
    """What a machine that comes back finds; raises AssertionError if anything that counted is lost."""
    catalogue = open_catalogue(RunDir(run_dir), None)
    steps = catalogue.steps()
    for step in steps:
        catalogue.verify(step)
    newest = steps[-1]
    assert newest >= called_complete, (newest, called_complete)
    found = losses(run_dir)
    assert all(found.get(step) == expected[step] for step in range(1, newest + 1)), "lines of metrics are lost"
    unfinished = len(catalogue.store.folders()) - len(steps)
    return {"newest": newest, "checkpoints": len(steps), "unfinished": unfinished, "later_lines": len(found) - newest}


def go_on(run_dir: Path, newest: int, expected: dict[int, float]) -> None:
    """Train on from an image, as far as the losses are known."""
    process = train(run_dir, min(newest + MORE, max(expected)))
    output, _ = process.communicate()
    assert process.returncode == 0, output[-3000:]
    assert f"resuming after step {newest} " in output, output[-3000:]
    assert all(expected[step] == loss for step, loss in losses(run_dir).items())


def main() -> None:
    parser = argparse.ArgumentParser(description="Images of a run's file system at random moments.")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--resumes", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/crash_images.json"))
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="longview-images-") as folder:
        make_image(Path(folder, "outer.img"), "3G", "btrfs")
        with mounted(Path(folder, "outer.img"), Path(folder, "outer")) as outer:
            source = outer / "source.img"
            make_image(source, "96M", "ext4")
            with mounted(source, Path(folder, "inner")) as inner:
                expected = take_images(source, inner / "run", outer, arguments.images, chance)
            for number in range(arguments.images):
                called_complete = int((outer / f"image-{number}.step").read_text())
                with mounted(outer / f"image-{number}.img", Path(folder, "image")) as image:
                    found.append(check_image(image / "run", called_complete, expected))
                    if number % max(1, arguments.images // arguments.resumes) == 0:
                        go_on(image / "run", found[-1]["newest"], expected)
                print(f"image {number}: {found[-1]}", flush=True)
    values = {
        "date": datetime.date.today().isoformat(),
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count()},
        "images": len(found),
        "with_an_unfinished_checkpoint": sum(image["unfinished"] > 0 for image in found),
        "with_lines_after_the_newest_checkpoint": sum(image["later_lines"] > 0 for image in found),
        "gone_on_from_bit_for_bit": len(range(0, len(found), max(1, arguments.images // arguments.resumes))),
    }
    arguments.json.write_text(json.dumps(values, indent=1) + "\n")
    print(json.dumps(values, indent=1))


if __name__ == "__main__":
    main()
