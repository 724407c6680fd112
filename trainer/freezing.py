"""Parts of a model that stay as they are: `frozen` in the configuration, by the names that checkpoints give them."""

import logging
from collections.abc import Sequence

from torch import nn

from embeddings.tables import is_sharded
from trainer.models.model import Model
from trainer.name_patterns import matches

logger = logging.getLogger(__name__)


def freeze(model: Model, patterns: Sequence[str]) -> None:
    """Let no gradient reach the dense parameters that `patterns` mean; tables know it from their configuration.

    Raises:
        ValueError: a pattern means neither a table nor a dense parameter, or nothing is left to train.
    """
    tables = {f"tables/{config.name}": config.frozen for config in model.tables.configs}
    dense = {f"dense/{name}": parameter for name, parameter in model.tower.named_parameters()}
    for pattern in patterns:
        if not any(matches(pattern, name) for name in (*tables, *dense)):
            raise ValueError(
                f"frozen: {pattern!r} is none of {', '.join(tables)} and no dense parameter, as {next(iter(dense))}"
            )
    for name, parameter in dense.items():
        if any(matches(pattern, name) for pattern in patterns):
            parameter.requires_grad_(False)
    if all(tables.values()) and not any(parameter.requires_grad for parameter in dense.values()):
        raise ValueError(f"frozen={list(patterns)} leaves nothing to train: name fewer parts")


def replicated_parameters(model: Model) -> list[nn.Parameter]:
    """What of a sharded model has gradients to average over ranks: dense parameters and replicated tables, as far as
    they are trained."""
    replicated = [each for each in model.tables.collections if not is_sharded(each)]
    parameters = [parameter for module in (model.tower, *replicated) for parameter in module.parameters()]
    return [parameter for parameter in parameters if parameter.requires_grad]


def announce_frozen(model: Model) -> None:
    """Log which parts are frozen."""
    tables = [config.name for config in model.tables.configs if config.frozen]
    dense = [parameter for parameter in model.tower.parameters() if not parameter.requires_grad]
    if tables or dense:
        logger.info(
            "frozen: tables %s; %d dense parameters of %s values",
            ", ".join(tables) or "none",
            len(dense),
            f"{sum(parameter.numel() for parameter in dense):,}",
        )
