"""Collections from table configs, and initial values that are a pure function of seed, table, row and column."""

import pytest
import torch
from torch import nn

import embeddings.tables as tables_module
from embeddings.config import SparseOptimizerConfig, TableConfig
from embeddings.tables import apply_sparse_optimizer, build_embedding_collection, init_tables

CPU = torch.device("cpu")


def table(name: str = "item", rows: int = 1000, dim: int = 16, features: tuple[str, ...] | None = None) -> TableConfig:
    """A table that looks up the feature of its own name."""
    return TableConfig(name=name, num_embeddings=rows, embedding_dim=dim, features=features or (name,))


def initial(config: TableConfig, seed: int = 0) -> torch.Tensor:
    """The initial values of one table."""
    collection = build_embedding_collection([config], device=CPU)
    init_tables(collection, [config], seed)
    return collection.embeddings[config.name].weight.detach()


def test_collection_on_meta_has_the_shapes_and_no_storage() -> None:
    collection = build_embedding_collection([table(), table("user", 7)], device=torch.device("meta"))
    shapes = {name: tuple(parameter.shape) for name, parameter in collection.named_parameters()}
    assert shapes == {"embeddings.item.weight": (1000, 16), "embeddings.user.weight": (7, 16)}
    assert all(parameter.is_meta for parameter in collection.parameters())


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([], "at least one table"),
        ([table(), table()], "table name 'item' is used twice"),
        ([table(features=("a", "a"))], "feature 'a' is used twice"),
        ([table(), table("user", features=("item",))], "feature 'item' is used twice"),
        ([table(), table("user", dim=32)], "share one embedding_dim"),
    ],
)
def test_wrong_collection_is_refused(tables: list[TableConfig], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_embedding_collection(tables, device=CPU)


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
    monkeypatch.setattr(tables_module, "INIT_CHUNK_ELEMENTS", 7 * 16)
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
    bits = tables_module._random_bits(torch.tensor(positions), -12345)
    assert [int(value) & mask for value in bits] == [splitmix(position, -12345 & mask) for position in positions]


def test_a_table_that_the_configs_do_not_list_is_refused() -> None:
    collection = build_embedding_collection([table()], device=CPU)
    with pytest.raises(ValueError, match="holds table 'item'"):
        init_tables(collection, [table("user")], 0)
    with pytest.raises(ValueError, match="no embedding collection"):
        init_tables(nn.Linear(2, 2), [table()], 0)


@pytest.mark.parametrize("kind", ["rowwise_adagrad", "adagrad", "sgd"])
def test_optimizer_is_attached_to_every_table(kind: str) -> None:
    collection = build_embedding_collection([table(), table("user", 7)], device=torch.device("meta"))
    apply_sparse_optimizer(collection, SparseOptimizerConfig(kind=kind, learning_rate=0.5))  # type: ignore[arg-type]
    for parameter in collection.parameters():
        assert parameter._optimizer_kwargs[0]["lr"] == 0.5
