"""Collections from table configs, and initial values that are a pure function of seed, table, row and column."""

from dataclasses import replace

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.config import SparseOptimizerConfig, TableConfig
from embeddings.optimizers import attach_optimizers
from embeddings.rows import initial as initial_rows
from embeddings.tables import build_tables, init_tables, rows_by_feature, table_weights
from tests.support.batches import random_batch
from trainer.models.negatives import retrieval_features

CPU = torch.device("cpu")


def table(name: str = "item", rows: int = 1000, dim: int = 16, features: tuple[str, ...] | None = None) -> TableConfig:
    """A table that looks up the feature of its own name."""
    return TableConfig(name=name, num_embeddings=rows, embedding_dim=dim, features=features or (name,))


def initial(config: TableConfig, seed: int = 0) -> torch.Tensor:
    """The initial values of one table."""
    tables = build_tables([config], device=CPU)
    init_tables(tables, seed)
    return table_weights(tables)[config.name]


def test_tables_on_meta_have_the_shapes_and_no_storage() -> None:
    tables = build_tables([table(), table("user", 7), table("tag", 5, dim=8)], device=torch.device("meta"))
    shapes = {name: tuple(value.shape) for name, value in table_weights(tables).items()}
    assert shapes == {"item": (1000, 16), "user": (7, 16), "tag": (5, 8)}
    assert all(parameter.is_meta for parameter in tables.parameters())


def test_there_is_one_collection_a_width_and_it_takes_its_own_keys() -> None:
    configs = [table(features=("a", "b")), table("user", 7), table("tag", 5, dim=8)]
    tables = build_tables(configs, device=CPU)
    keys = ["tag", "a", "noise", "b", "user"]
    features = KeyedJaggedTensor(keys, torch.tensor([4, 1, 9999, 1, 6]), lengths=torch.ones(5, dtype=torch.int64))
    looked_up = tables(features)
    assert [sorted(rows) for rows in looked_up] == [["a", "b", "user"], ["tag"]]
    rows = rows_by_feature(looked_up)
    weights = table_weights(tables)
    for feature, name, row in (("a", "item", 1), ("b", "item", 1), ("user", "user", 6), ("tag", "tag", 4)):
        assert torch.equal(rows[feature].values()[0], weights[name][row])


def test_float16_rows_are_looked_up_in_float32() -> None:
    config = replace(table(rows=100), dtype="float16")
    tables = build_tables([config], device=CPU)
    init_tables(tables, 0)
    weights = table_weights(tables)["item"]
    assert weights.dtype == torch.float16
    assert torch.equal(weights, initial(table(rows=100)).half())
    features = KeyedJaggedTensor(["item"], torch.tensor([7]), lengths=torch.tensor([1]))
    assert torch.equal(rows_by_feature(tables(features))["item"].values(), weights[7:8].float())


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([], "at least one table"),
        ([table(), table()], "table name 'item' is used twice"),
        ([table(), table("user", features=("item",))], "feature 'item' is used twice"),
    ],
)
def test_wrong_tables_are_refused(tables: list[TableConfig], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_tables(tables, device=CPU)


def test_lookups_know_their_counts_without_asking_the_device() -> None:
    """A tensor on the meta device has no values: whatever needed some, as a wait for a GPU does, would fail."""
    meta = torch.device("meta")
    batch = random_batch([5, 0, 9], [2, 3, 1], context_names=("country",)).to(meta)
    names = batch.features.keys()
    tables = build_tables([table(f"t{i}", features=(name,)) for i, name in enumerate(names)], device=meta)
    rows = rows_by_feature(tables(batch.features))
    assert {name: len(rows[name].values()) for name in ("item_id", "sample.country")} == {
        "item_id": 5 + 9 + 2 + 3 + 1,
        "sample.country": 3,
    }
    pair = retrieval_features(torch.arange(7, device=meta), torch.arange(4, device=meta))
    tables = build_tables([table(features=tuple(pair.keys()))], device=meta)
    assert [len(each.values()) for each in rows_by_feature(tables(pair)).values()] == [7, 4]


def test_initial_values_are_uniform_within_the_bound() -> None:
    values = initial(table(rows=20_000, dim=16))
    bound = 16**-0.5
    assert values.abs().max() <= bound
    assert values.max() > 0.999 * bound
    assert values.min() < -0.999 * bound
    assert abs(values.mean()) < 0.01 * bound
    assert abs(values.std() - bound / 3**0.5) < 0.01 * bound
    correlation = torch.corrcoef(values.T) - torch.eye(16)
    assert correlation.abs().max() < 0.03


def test_initial_values_differ_by_seed_and_table_only() -> None:
    values = initial(table())
    torch.testing.assert_close(initial(table()), values, rtol=0, atol=0)
    assert not torch.equal(initial(table(), seed=1), values)
    assert not torch.equal(initial(table("user")), values)
    torch.testing.assert_close(initial(table(rows=10)), values[:10], rtol=0, atol=0)


def test_initial_values_do_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    values = initial(table())
    monkeypatch.setattr(initial_rows, "CHUNK_VALUES", 7 * 16)
    torch.testing.assert_close(initial(table()), values, rtol=0, atol=0)


def test_initial_values_follow_splitmix64() -> None:
    """An independent implementation in Python's integers, at positions beyond 2^32."""
    mask = (1 << 64) - 1

    def splitmix(position: int, key: int) -> int:
        bits = (position * 0x9E3779B97F4A7C15 + key) & mask
        bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & mask
        bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & mask
        return bits ^ (bits >> 31)

    positions = [0, 1, 2**32 + 5, 2**45 + 11]
    bits = initial_rows.random_bits(torch.tensor(positions), -12345)
    assert [int(value) & mask for value in bits] == [splitmix(position, -12345 & mask) for position in positions]


def test_every_table_gets_its_optimizer() -> None:
    own = SparseOptimizerConfig(kind="adam", learning_rate=0.01, betas=(0.8, 0.99))
    tables = build_tables([table(), replace(table("user", 7), optimizer=own)], device=torch.device("meta"))
    attach_optimizers(tables, SparseOptimizerConfig(kind="adagrad", learning_rate=0.5))
    item, user = tables.parameters()
    assert item._optimizer_kwargs[0] == {"lr": 0.5, "eps": 1e-8}
    assert user._optimizer_kwargs[0] == {"lr": 0.01, "eps": 1e-8, "beta1": 0.8, "beta2": 0.99}
