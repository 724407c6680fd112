"""From the configuration to the labels that a ranker predicts."""

from collections.abc import Callable, Sequence

from pipelines.features import DatasetInfo
from trainer.labels import binary, classes, ordered, regression
from trainer.labels.config import LabelConfig
from trainer.labels.kind import LabelKind

BUILD: dict[str, Callable[[LabelConfig, DatasetInfo], LabelKind]] = {
    "binary": binary.build,
    "regression": regression.build,
    "ordered": ordered.build,
    "classes": classes.build,
}
"""How each kind is made."""


def label_configs(stated: Sequence[LabelConfig] | None, info: DatasetInfo) -> tuple[LabelConfig, ...]:
    """What the configuration states, or else every action of the data set."""
    return tuple(LabelConfig(name=action) for action in info.actions) if stated is None else tuple(stated)


def build_labels(configs: Sequence[LabelConfig], info: DatasetInfo) -> tuple[LabelKind, ...]:
    """The labels of these configurations.

    Raises:
        ValueError: the data set lacks a label, or it is of another kind.
    """
    return tuple(BUILD[config.kind](config, info) for config in configs)
