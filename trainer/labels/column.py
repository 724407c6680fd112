"""The label column of a data set that a configuration names."""

from pipelines.features import Column, DatasetInfo, Kind
from trainer.labels.config import LabelConfig


def label_column(config: LabelConfig, info: DatasetInfo, kind: Kind) -> Column:
    """The label column that the config names, of this kind of value.

    Raises:
        ValueError: there is no such column, or it holds something else.
    """
    columns = {column.name: column for column in info.of("label")}
    if config.name not in columns:
        actions = "" if config.kind != "binary" else f"; actions: {', '.join(info.actions)}"
        raise ValueError(
            f"model.labels: kind={config.kind} of {config.name!r}, which {info.name} does not have; label columns: "
            f"{', '.join(columns) or 'none'}{actions}"
        )
    if columns[config.name].kind != kind:
        holds = {"number": "numbers", "id": "ids"}[columns[config.name].kind]
        raise ValueError(f"model.labels: kind={config.kind} of {config.name!r} does not fit, the column holds {holds}")
    return columns[config.name]
