"""Any columns: what a model makes of random schemas equals a plain Python reading of the rows, on 1, 2 and 3 ranks."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from embeddings.config import TableConfig
from embeddings.tables import Tables, build_tables, init_tables, rows_by_feature
from pipelines.batches.batch import Inputs
from pipelines.config import DataConfig
from pipelines.reading.loader import build_loader
from pipelines.selection import Feature, select
from tests.pipelines.prepare.test_random_schemas import MAX_HISTORY, World, expected_values, make_world
from trainer.models.config import InputConfig, NumberConfig
from trainer.models.encoding import InputEncoder
from trainer.models.rows import UNKNOWN_LOG_SCALE, RowEncoder

DIM = 8
THRESHOLDS = (-1.0, 0.0, 0.5, 100.0)
Vector = list[float]


def made_config(draw: random.Random, world: World) -> InputConfig:
    """Some numbers with thresholds or as they are, some lists summed; a hidden layer in place of the sum at times."""
    features = world.selection.features
    numbers = [each.name for each in features if each.kind == "number"]
    return InputConfig(
        numbers={
            name: NumberConfig(thresholds=THRESHOLDS, transform=draw.choice(["log", "none"]))
            for name in draw.sample(numbers, len(numbers) // 2)
        },
        pooling={each.name: draw.choice(["mean", "sum"]) for each in features if each.kind == "ids"},
        combine=draw.choice(["sum", "mlp"]),
    )


def made_tables(draw: random.Random, world: World) -> Tables:
    """A table of a width of its own for each space, shared by its columns."""
    features: dict[str, list[str]] = {"item": []}
    for each in world.selection.features:
        if each.space is not None:
            features.setdefault(each.space, []).append(each.name)
    tables = build_tables(
        [
            TableConfig(
                name=space,
                num_embeddings=world.info.spaces[space].rows,
                embedding_dim=draw.choice([4, 8, 16]),
                features=tuple(names) or ("unread",),
            )
            for space, names in features.items()
        ],
        device=torch.device("cpu"),
    )
    init_tables(tables, seed=1)
    return tables


def weights_of(tables: Tables) -> dict[str, list[Vector]]:
    """Each table's rows."""
    return {
        name.split(".")[-2]: weight.tolist()
        for collection in tables.collections
        for name, weight in collection.state_dict().items()
    }


def pooled(rows: list[Vector], width: int, how: str) -> Vector:
    """Rows as one, zeros for none."""
    sums = [sum(row[place] for row in rows) for place in range(width)]
    return [each / max(1, len(rows)) for each in sums] if how == "mean" else sums


def number(value: float, config: NumberConfig) -> tuple[Vector, int]:
    """([its value, whether it is known], its bucket; 0 where it is missing)."""
    if math.isnan(value):
        return [0.0, 0.0], 0
    scaled = value
    if config.transform == "log":
        scaled = math.copysign(math.log1p(abs(value)), value) / UNKNOWN_LOG_SCALE
    return [scaled, 1.0], 1 + sum(value >= border for border in config.thresholds)


def expected_rows(
    encoder: RowEncoder, values: dict[str, list[Any]], features: list[Feature], config: InputConfig, tables: Tables
) -> torch.Tensor:
    """[N, D] from the values of the rows: ids side by side, then numbers, then what the projection makes of them."""
    weights, numbers = weights_of(tables), [each for each in features if each.kind == "number"]
    side_by_side, vectors = [], []
    for row in range(len(values[features[0].name])):
        parts: list[Vector] = []
        for feature in features:
            if feature.kind != "number":
                table, value = weights[feature.space or ""], values[feature.name][row]
                many = [table[each] for each in value] if feature.kind == "ids" else [table[value]]
                parts.append(pooled(many, len(table[0]), config.pooling.get(feature.name, "mean")))
        read = [number(values[each.name][row], config.numbers.get(each.name, NumberConfig())) for each in numbers]
        parts += [[each[0][0] for each in read], [each[0][1] for each in read]]
        side_by_side.append([each for part in parts for each in part])
        if encoder.numbers is not None:
            stride = len(encoder.numbers.vectors) // len(numbers)
            places = [place * stride + bucket for place, (_, bucket) in enumerate(read)]
            vectors.append(encoder.numbers.vectors[places].sum(0))
    found: torch.Tensor = encoder.projection(torch.tensor(side_by_side))
    return found + torch.stack(vectors) if vectors else found


def check(world: World, config: InputConfig, tables: Tables, encoder: InputEncoder, inputs: Inputs) -> int:
    """What a batch's columns become, against its rows; returns how many rows of features were compared."""
    rows = [world.rows[user] for user in inputs.user_id.tolist() if user >= 0]
    if not rows:
        return 0
    embedded, of, compared = rows_by_feature(tables(inputs.features)), world.selection.of, 0
    pairs = [
        (encoder.shared, list(of("event", "candidate"))),
        (encoder.of_events, list(of("event"))),
        (encoder.of_candidates, list(of("candidate"))),
        *((each, [feature]) for each, feature in zip(encoder.context, of("sample"), strict=True)),
    ]
    for part, features in pairs:
        assert (part is None) == (not features)
        if part is None:
            continue
        values = {feature.name: expected_values(world, feature, rows) for feature in features}
        found = part(embedded, inputs, torch.float32)
        if len(found):
            expected = expected_rows(part, values, features, config, tables)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        compared += len(found)
    return compared


@pytest.mark.parametrize("seed", range(15))
@torch.no_grad()
def test_rows_of_any_columns_are_encoded_as_a_plain_reading_says(tmp_path: Path, seed: int) -> None:
    world, draw = make_world(tmp_path / "data", seed), random.Random(seed)
    if not any(feature.space for feature in world.selection.features):
        # A model without any ids has no tables and is refused.
        world.selection = select(world.info)
    config, tables = made_config(draw, world), made_tables(draw, world)
    torch.manual_seed(seed)
    widths = {table.name: table.embedding_dim for table in tables.configs}
    encoder = InputEncoder(world.selection, widths=widths, config=config, dim=DIM, num_actions=2)
    data = DataConfig(path=world.path, global_batch_size=7, max_history_len=MAX_HISTORY, reader_threads=0)
    compared = []
    for world_size in (1, 2, 3):
        batches = [
            batch
            for rank in range(world_size)
            for batch in build_loader(data, split="train", rank=rank, world_size=world_size, selection=world.selection)
        ]
        compared.append(sum(check(world, config, tables, encoder, batch.inputs) for batch in batches))
    assert len(set(compared)) == 1 and (compared[0] > 0)
