"""Which columns of the data a model reads, and the tables that their ids are looked up in."""

from collections.abc import Mapping, Sequence

from embeddings.config import TableConfig, UnboundedConfig
from pipelines.features import ITEM_ID, ITEM_SPACE, DatasetInfo
from pipelines.selection import Selection, select
from trainer.config import TableSettings, TrainConfig
from trainer.labels.loss import label_columns
from trainer.name_patterns import matches


def ranker_columns(config: TrainConfig, info: DatasetInfo) -> Selection:
    """What `model.input` names, and what the labels need.

    Raises:
        ValueError: it names, or gives a setting of, a column that the data set does not have.
    """
    chosen = config.model.input
    selection = select(
        info,
        event=chosen.event,
        candidate=chosen.candidate,
        context=chosen.context,
        counts=chosen.counts,
        labels=label_columns(config.model.labels, info),
    )
    for name, kind, settings in (("numbers", "number", chosen.numbers), ("pooling", "ids", chosen.pooling)):
        have = [feature.name for feature in selection.features if feature.kind == kind]
        odd = sorted(set(settings) - set(have))
        if odd:
            raise ValueError(
                f"model.input.{name} names {odd[0]!r}, which is none of the columns of this kind that are read: "
                f"{', '.join(have) or 'there are none'}"
            )
    return selection


def item_columns(info: DatasetInfo) -> Selection:
    """A selection of the item ids alone."""
    return select(info, event=(ITEM_ID,), candidate=(ITEM_ID,), context=())


def table_configs(
    config: TrainConfig, info: DatasetInfo, selection: Selection, further: Mapping[str, str] | None = None
) -> tuple[TableConfig, ...]:
    """One table for each space that `selection` has ids of; `further` lookups name the space of each.

    Raises:
        ValueError: `tables` has settings of a space that is none of these, or that do not suit it.
    """
    for space in (further or {}).values():
        if info.spaces[space].unbounded:
            raise ValueError(
                f"the ids of {space!r} in {info.name} are unbounded, so there is no catalogue for retrieval to rank: "
                "prepare them with a vocabulary"
            )
    lookups = {feature.name: feature.space for feature in selection.features if feature.space is not None}
    features: dict[str, list[str]] = {}
    for name, space in {**lookups, **(further or {})}.items():
        features.setdefault(space, []).append(name)
    unknown = sorted(set(config.tables) - set(features))
    if unknown:
        raise ValueError(f"tables names {unknown[0]!r}, which is none of the model's tables: {', '.join(features)}")
    tables = []
    for space, names in features.items():
        settings = config.tables.get(space, TableSettings())
        unbounded, placed = settings.unbounded, config.placement.tables.get(space)
        if info.spaces[space].unbounded:
            unbounded = unbounded or UnboundedConfig()
        elif unbounded is not None:
            raise ValueError(f"tables.{space}.unbounded has no effect: the ids of the data are bounded; remove it")
        tables.append(
            TableConfig(
                name=space,
                num_embeddings=info.spaces[space].rows,
                embedding_dim=settings.embedding_dim or config.embedding_dim,
                features=tuple(names),
                dtype=settings.dtype,
                optimizer=settings.optimizer,
                frozen=any(matches(pattern, f"tables/{space}") for pattern in config.frozen),
                initial_bound=settings.initial_bound,
                unbounded=unbounded,
                pooled=_summed_into(space, names, selection, config) if placed is not None and placed.pooled else None,
            )
        )
    return tuple(tables)


def _summed_into(space: str, names: Sequence[str], selection: Selection, config: TrainConfig) -> str:
    """The parts that have a bag each of a pooled table's features.

    Raises:
        ValueError: a feature has single ids, or another part's; or sums would be sent rounded.
    """
    features = {feature.name: feature for feature in selection.features}
    single = [name for name in names if name not in features or features[name].kind != "ids"]
    if single:
        raise ValueError(
            f"placement.tables.{space}.pooled adds up many ids, but {single[0]!r} reads single ones: remove it"
        )
    parts = {"+".join(features[name].parts) for name in names}
    if len(parts) > 1:
        raise ValueError(
            f"placement.tables.{space}.pooled adds up bags of one part's rows, but {', '.join(names)} are columns of "
            f"{' and of '.join(sorted(parts))}: remove it"
        )
    exchange = config.placement.exchange
    if (exchange.rows, exchange.gradients) != ("float32", "float32"):
        raise ValueError(
            f"placement.tables.{space}.pooled sends sums in full: leave placement.exchange.rows and gradients float32, "
            "or remove pooled"
        )
    return parts.pop()


def pooled_spaces(tables: tuple[TableConfig, ...]) -> frozenset[str]:
    """The spaces whose tables give sums of rows."""
    return frozenset(table.name for table in tables if table.pooled is not None)


def item_table(config: TrainConfig, info: DatasetInfo, further: str) -> tuple[TableConfig, ...]:
    """The items' table alone, with one more lookup in it."""
    return table_configs(config, info, item_columns(info), {further: ITEM_SPACE})


def widths(tables: tuple[TableConfig, ...]) -> dict[str, int]:
    """Width of the rows of each space's table."""
    return {table.name: table.embedding_dim for table in tables}
