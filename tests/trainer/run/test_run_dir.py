"""A run directory refuses another run's configuration, and its metric files never repeat a step."""

import functools
import json
import operator
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trainer.command_line import WrongUse
from trainer.config import TableSettings
from trainer.recipes import load_recipe
from trainer.run import run_dir
from trainer.run.json_lines import JsonLines, forget_after
from trainer.run.run_dir import RunDir, check_nothing_lost, check_still_ours, locked
from trainer.run.writing import write_json
from trainer.typed_values import to_dict

CONFIG = {"name": "demo", "max_steps": 10, "seed": 1, "checkpoint": {"every_steps": 5, "store": None}}


def test_settings_that_do_not_change_the_numbers_may_change(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    write_json(run.config_file, CONFIG)
    run.check_same_run({**CONFIG, "max_steps": 99, "checkpoint": {"every_steps": 1, "store": None}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 2}, "seed=1, now 2"),
        ({"name": "other"}, "recipe 'demo', not 'other'"),
        ({"new": 1}, "trained by another version of this code: only this one knows new; go on with the version"),
        ({"checkpoint": {"every_steps": 5, "store": None, "depth": 2}}, "only this one knows checkpoint.depth"),
        ({"checkpoint": {"every_steps": 5, "store": "s3://b"}}, 'checkpoint.store=null, now "s3://b"'),
    ],
)
def test_another_run_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    run = RunDir(tmp_path)
    write_json(run.config_file, CONFIG)
    with pytest.raises(ValueError, match=message):
        run.check_same_run({**CONFIG, **change})


def test_a_table_that_is_told_other_settings_later_is_no_other_version_of_the_code(tmp_path: Path) -> None:
    run, recipe = RunDir(tmp_path), load_recipe("kuairand_sample")
    told = replace(recipe, tables={"item": TableSettings(dtype="float16")})
    for before, now, message in (
        (recipe, told, "was trained without tables.item, now {.*float16.*}: resume with the old value"),
        (told, recipe, "was trained with tables.item={.*float16.*}, now without it: resume with the old value"),
    ):
        run.save_config(to_dict(before), {})
        with pytest.raises(WrongUse, match=message):
            run.check_same_run(to_dict(now))


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="no run"):
        RunDir(tmp_path).check_same_run(CONFIG)
    with pytest.raises(ValueError, match="is a file"):
        RunDir(tmp_path / "thesis.tex").check_same_run(CONFIG)


def test_what_a_run_leaves_that_ends_before_its_first_step_is_no_hindrance(tmp_path: Path) -> None:
    """But a checkpoint without the configuration that it is of is one."""
    run = RunDir(tmp_path)
    for folder in (run.path / "logs", run.checkpoints / "trial"):
        folder.mkdir(parents=True)
    run.check_same_run({"name": "demo"})
    (run.checkpoints / "step-00000001").mkdir()
    (run.checkpoints / "step-00000001" / "COMPLETE").touch()
    with pytest.raises(ValueError, match="holds no config"):
        run.check_same_run({"name": "demo"})


def test_a_run_that_has_saved_does_not_begin_anew(tmp_path: Path) -> None:
    """Its checkpoints may be on a disk that is not mounted, or may have been removed by mistake."""
    run = RunDir(tmp_path)
    check_nothing_lost(run, "s3://bucket/run")
    write_json(run.saving_file, {"step": 3, "seconds": 1.0})
    with pytest.raises(ValueError, match=r"has saved checkpoints, but s3://bucket/run holds no complete one: mount it"):
        check_nothing_lost(run, "s3://bucket/run")


def test_json_lines_never_repeat_a_step_and_drop_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    lines = JsonLines(path)
    assert not lines.append({"step": 2})
    assert lines.append({"step": 3})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize("tail", ['{"st', '{"step": 3', "\0\0\0\0", '\0\0\n{"ste', '{"loss": 1}\n', "3\n"])
def test_what_a_crash_left_at_the_end_of_json_lines_is_dropped(tail: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n' + tail)
    assert JsonLines(path).append({"step": 3})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_a_line_in_the_middle_that_no_crash_leaves_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        JsonLines(path)


def test_steps_that_are_taken_again_are_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert forget_after(path, 3) == []
    path.write_text('{"step": 2, "loss": 5.0}\n{"step": 4, "loss": 6.0}\n{"st')
    assert forget_after(path, 3) == [{"step": 4, "loss": 6.0}]
    assert path.read_text() == '{"step": 2, "loss": 5.0}\n'
    # A page that a file server never got before its client lost its power, and a later one that it did get.
    path.write_text('{"step": 2, "loss": 5.0}\n{"st' + "\0" * 100 + '"step": 5}\n{"step": 6, "loss": 6.0}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2, is not a JSON object"):
        forget_after(path, 6)
    assert forget_after(path, 3) == []
    assert path.read_text() == '{"step": 2, "loss": 5.0}\n'


def test_an_older_step_that_is_not_there_is_added(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "eval.jsonl")
    assert lines.append({"step": 8}) and lines.append({"step": 4}) and not lines.append({"step": 8})


def test_an_undefined_metric_is_null(tmp_path: Path) -> None:
    path = tmp_path / "eval.jsonl"
    JsonLines(path).append({"step": 1, "auc/click": float("nan"), "ne/click": 0.5})
    assert path.read_text() == '{"step": 1, "auc/click": null, "ne/click": 0.5}\n'


HOLD_THE_LOCK = """
import pathlib, sys, time
from trainer.run.run_dir import RunDir, locked
with locked(RunDir(pathlib.Path(sys.argv[1]))):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_one_process_trains_a_run_at_a_time(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    other = subprocess.Popen([sys.executable, "-c", HOLD_THE_LOCK, str(run.path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(ValueError, match=f"is being trained by another job .process {other.pid} on "), locked(run):
        pytest.fail("locked twice")
    # However it ends.
    other.kill()
    other.communicate()
    with locked(run):
        pass
    with locked(run):
        pass
    # A new run, as far as its configuration goes; also where the job was ended while it wrote that.
    run.config_file.with_name("config.json.partial").write_text("{")
    run.check_same_run(CONFIG)


def test_a_job_is_told_from_one_of_the_same_number_and_name_in_another_container(tmp_path: Path) -> None:
    """A pod behind a broken network goes on while another takes its place, where its lock has lapsed."""
    run = RunDir(tmp_path)
    with locked(run):
        run.save_config({}, {})
        check_still_ours(run)
        run_dir._own_word.cache_clear()
        with pytest.raises(ValueError, match=r"lock names another job .process"):
            check_still_ours(run)


def test_a_file_that_cannot_be_written_is_named_with_what_to_do(tmp_path: Path) -> None:
    """/dev/full takes no byte, as a disk without room."""
    said = "make room or give access, then start the same command"
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    (tmp_path / "config.json.partial").symlink_to("/dev/full")
    run = RunDir(tmp_path)
    # As another user's cannot be opened.
    run.lock_file.mkdir()
    with pytest.raises(OSError, match=rf"lock cannot be written: Is a directory; {said}"), locked(run):
        pytest.fail("locked")
    run.lock_file.rmdir()
    with pytest.raises(OSError, match=rf"metrics\.jsonl cannot be written: No space left on device; {said}"):
        JsonLines(run.metrics_file).append({"step": 1})
    with pytest.raises(OSError, match=rf"config\.json cannot be written: No space left on device; {said}"):
        run.save_config({}, {})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.jsonl"], "nothing half written stays"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe{}", b'"\xcf"'])
def test_a_damaged_file_is_named_with_what_to_do(content: bytes, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for file, read in ((run.config_file, run.saved_config), (run.environment_file, run.saved_environment)):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{file}.*: (restore|remove) it"):
            read()
    run.config_file.write_text('{"name": "demo", "checkpoint": 3}')
    with pytest.raises(ValueError, match="does not hold a configuration"):
        run.saved_config()


@pytest.mark.parametrize(("change", "message"), [({"old_knob": 3}, "unknown key 'old_knob'"), ({"name": None}, "name")])
def test_a_configuration_of_another_version_is_named_with_its_file(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    run = RunDir(tmp_path)
    write_json(run.config_file, {**to_dict(load_recipe("kuairand_sample")), **change})
    with pytest.raises(
        WrongUse, match=rf"config.json is not of this version of the code: .*{message}.*; use the version"
    ):
        run.trained_config()


def test_a_run_that_is_none_and_one_that_was_edited_are_not_called_another_versions(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with pytest.raises(WrongUse, match=rf"^{tmp_path} holds no config\.json: name a run directory that `train` made$"):
        run.trained_config()
    run.save_config(to_dict(load_recipe("kuairand_sample")), {})
    run.config_file.write_text(run.config_file.read_text().replace('"num_layers": ', '"num_layers": 1'))
    with pytest.raises(WrongUse, match=r"config\.json is not what the run wrote, .* with --set\)$"):
        run.trained_config()


LACKING = {
    "seed": ("seed",),
    "optimizer": ("optimizer",),
    "model.retrieval": ("model", "retrieval"),
    "tables": ("tables",),
    "model.stages[0].global_columns": ("model", "stages", 0, "global_columns"),
}


@pytest.mark.parametrize("key", LACKING)
def test_a_setting_that_an_old_run_does_not_name_is_not_taken_from_todays_defaults(key: str, tmp_path: Path) -> None:
    run, values = RunDir(tmp_path), to_dict(load_recipe("kuairand_sample"))
    *groups, name = LACKING[key]
    group: Any = functools.reduce(operator.getitem, groups, values)
    del group[name]
    run.save_config(values, {})
    with pytest.raises(WrongUse, match=rf"config.json is not of this version of the code: key '{re.escape(key)}'"):
        run.trained_config()
    with pytest.raises(WrongUse, match=f"only this one knows {re.escape(key)};"):
        run.check_same_run(to_dict(load_recipe("kuairand_sample")))


def test_a_run_need_not_name_what_does_not_change_its_numbers(tmp_path: Path) -> None:
    run, values = RunDir(tmp_path), to_dict(load_recipe("kuairand_sample"))
    del values["watch"], values["evaluation"], values["data"]["reader_threads"], values["log_every"]
    run.save_config(values, {})
    assert run.trained_config().watch == load_recipe("kuairand_sample").watch
    run.check_same_run(to_dict(load_recipe("kuairand_sample")))


def test_a_flipped_bit_of_the_configuration_changes_no_setting(tmp_path: Path) -> None:
    """With other heads or labels the same weights would give other scores, without a word."""
    run, chance = RunDir(tmp_path), random.Random(3)
    config = json.loads(json.dumps(to_dict(load_recipe("kuairand_sample"))))
    run.save_config(config, {"item": "0123456789abcdef"})
    content, refused = run.config_file.read_bytes(), 0
    for _ in range(400):
        bit = chance.randrange(8 * len(content))
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        run.config_file.write_bytes(changed)
        try:
            found = run.saved_config()
        except WrongUse:
            refused += 1
            continue
        # A key's name may have become another: the digest's own, which no recipe has.
        assert found == config or set(found or ()) - set(config), f"bit {bit}"
    assert refused > 200
