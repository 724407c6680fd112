"""The rows of the ablation are inputs that the recipe takes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.ablation import RECIPE, RESULTS, ROWS
from pipelines.storage.dataset_json import read_dataset_info
from trainer.models.config import InputConfig
from trainer.recipes import load_recipe
from trainer.resolve import resolve

ROOT = Path(__file__).resolve().parents[2]


def test_committed_rows_read_what_the_table_says() -> None:
    report = json.loads((ROOT / RESULTS).read_text())
    assert {row: values["inputs"] for row, values in report["rows"].items()} == json.loads(json.dumps(ROWS))


@pytest.mark.parametrize("row", list(ROWS))
def test_a_row_is_read_by_the_recipe(row: str) -> None:
    recipe = load_recipe(RECIPE)
    columns = {name: None if names is None else tuple(names) for name, names in ROWS[row].items()}
    data = replace(recipe.data, path=str(ROOT / recipe.data.path))
    chosen = replace(recipe, data=data, model=replace(recipe.model, input=replace(InputConfig(), **columns)))
    features = resolve(chosen, read_dataset_info(data.path)).task.selection.features
    assert "item_id" in {feature.name for feature in features}
    assert len(features) > 1 or row == "item id"
