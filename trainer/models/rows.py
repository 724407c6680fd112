"""One vector for an event, a candidate or a sample, from the rows and numbers of its columns.

Shapes: N rows, D model width, F numbers, K borders of a number's buckets.
"""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchrec.sparse.jagged_tensor import JaggedTensor

from pipelines.batches.batch import Inputs
from pipelines.selection import Feature
from trainer.models.buckets import bucket_borders, num_vectors
from trainer.models.config import InputConfig, NumberConfig

UNKNOWN_LOG_SCALE = 10.0
"""Scale of logarithms where the data set has no statistics of a number: 22,000 is then about 1."""
NO_BORDER = torch.finfo(torch.float32).max
"""Fills a number's borders up to the most that one has; finite, as everything that a checkpoint holds."""
COLUMNS = 8
"""GPUs read 16 bytes of a 16-bit row at a time, and take slower products where rows are no multiple of that."""
INIT_STD = 0.02
"""Standard deviation of the initial values of learned vectors."""


class RowEncoder(nn.Module):
    """The sum of one projection a feature, [N, D]: one linear map of the features side by side.

    An id enters as its row of its table, many ids as the mean or sum of theirs, a number by its value and its bucket.

    Args:
        features: at least one, all over the same N rows.
        widths: width of each space's table.
        config: how numbers and many ids enter, and whether a hidden layer stands in the place of the linear map.
        dim: D.  A single id of that width enters as it is.
        pooled: spaces whose tables give sums in the place of many ids' rows.
    """

    def __init__(
        self,
        features: Sequence[Feature],
        *,
        widths: Mapping[str, int],
        config: InputConfig,
        dim: int,
        pooled: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.summed = {feature.name for feature in features if feature.space in pooled}
        self.ids = tuple(feature for feature in features if feature.kind != "number")
        self.pooling = {each.name: config.pooling.get(each.name, "mean") for each in self.ids if each.kind == "ids"}
        numbers = [feature for feature in features if feature.kind == "number"]
        self.numbers = NumberEncoder(numbers, config=config, dim=dim) if numbers else None
        width = sum(widths[feature.space or ""] for feature in self.ids) + 2 * len(numbers)
        self.projection: nn.Module
        if config.combine == "mlp":
            self.projection = nn.Sequential(nn.Linear(width, dim), nn.SiLU(), nn.Linear(dim, dim))
        elif len(features) == 1 and self.ids and width == dim:
            self.projection = nn.Identity()
        else:
            self.projection = nn.Linear(width, dim)

    def forward(self, embedded: Mapping[str, JaggedTensor], inputs: Inputs, dtype: torch.dtype) -> Tensor:
        """[N, D] in `dtype`."""
        parts = [self._rows(feature, embedded, inputs).to(dtype) for feature in self.ids]
        if isinstance(self.projection, nn.Identity):
            return parts[0]
        if self.numbers is not None:
            values_N2F, vectors_ND = self.numbers(inputs, dtype)
            parts.append(values_N2F)
        first, *layers = self.projection if isinstance(self.projection, nn.Sequential) else [self.projection]
        assert isinstance(first, nn.Linear)
        rows_ND = side_by_side(parts, first)
        for layer in layers:
            rows_ND = layer(rows_ND)
        return rows_ND if self.numbers is None else rows_ND + vectors_ND

    def _rows(self, feature: Feature, embedded: Mapping[str, JaggedTensor], inputs: Inputs) -> Tensor:
        """One feature's [N, its width]."""
        values: Tensor = embedded[feature.name].values()
        if feature.kind == "id":
            return values
        lens_N, mean = inputs.lens[feature.name], self.pooling[feature.name] == "mean"
        summed = values[: lens_N.numel()] if feature.name in self.summed else add_up(values, lens_N)
        return summed / lens_N.clamp(min=1)[:, None] if mean else summed


class NumberEncoder(nn.Module):
    """Numbers by value and by bucket.  A missing one has the value 0 and a bucket of its own.

    What it knows of the training split is saved with the model: data of another day is read by the same measure.
    """

    borders: Tensor
    center: Tensor
    scale: Tensor

    def __init__(self, features: Sequence[Feature], *, config: InputConfig, dim: int) -> None:
        super().__init__()
        self.names = tuple(feature.name for feature in features)
        chosen = [config.numbers.get(feature.name, NumberConfig()) for feature in features]
        self.logarithmic = tuple(number.transform == "log" for number in chosen)
        borders = bucket_borders(features, config)
        most = max(len(each) for each in borders)
        padded = torch.tensor([[*each, *[NO_BORDER] * (most - len(each))] for each in borders], dtype=torch.float32)
        moments = [_moments(feature, number) for feature, number in zip(features, chosen, strict=True)]
        self.register_buffer("borders", padded)
        self.register_buffer("center", torch.tensor([mean for mean, _ in moments], dtype=torch.float32))
        self.register_buffer("scale", torch.tensor([std for _, std in moments], dtype=torch.float32))
        # A number's vectors: missing, then its buckets.
        self.vectors = learned_vectors(num_vectors(borders), dim)

    def forward(self, inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """([N, 2 F] values and whether they are known; [N, D] sum of the buckets' vectors), in `dtype`."""
        raw_FN = torch.stack([inputs.numbers[name] for name in self.names])
        known_FN = ~raw_FN.isnan()
        value_FN = torch.where(known_FN, raw_FN, 0)
        bucket_FN = torch.where(known_FN, 1 + torch.searchsorted(self.borders, value_FN, right=True), 0)
        # All rows of a batch read, and their gradients meet in, a few vectors: a product with a matrix of 0 and 1.
        places = torch.arange(self.borders.shape[1] + 2, device=raw_FN.device)
        chosen_NB = (bucket_FN.t()[:, :, None] == places).flatten(1).to(dtype)
        vectors_ND = combine(chosen_NB, self.vectors)
        scaled = [
            (_logarithm(value_N) if logarithmic else value_N)
            for value_N, logarithmic in zip(value_FN, self.logarithmic, strict=True)
        ]
        scaled_NF = (torch.stack(scaled, dim=1) - self.center) / self.scale
        known_NF = known_FN.t()
        values_N2F = torch.cat([torch.where(known_NF, scaled_NF, 0), known_NF.to(scaled_NF.dtype)], dim=1)
        return values_N2F.to(dtype), vectors_ND


def side_by_side(parts: Sequence[Tensor], linear: nn.Linear) -> Tensor:
    """`linear` of the parts joined by columns, [N, D].

    A part wider than half of D is multiplied by its weights alone, and the products are added up: to copy its rows
    beside the others', and its gradient out of theirs, would move more bytes than the sum does.
    """
    widths = [part.shape[1] for part in parts]
    wide = [2 * width > linear.out_features and width % COLUMNS == 0 for width in widths]
    narrow = [i for i, alone in enumerate(wide) if not alone]
    groups = [[i] for i, alone in enumerate(wide) if alone] + ([narrow] if narrow else [])
    weights = torch.split(linear.weight, widths, dim=1) if len(groups) > 1 else None
    rows_ND: Tensor = linear.bias
    for group in groups:
        part = _join([parts[i] for i in group])
        weight = linear.weight if weights is None else _join([weights[i] for i in group])
        missing = missing_columns(part.shape[1], part)
        if missing:
            part, weight = F.pad(part, (0, missing)), F.pad(weight, (0, missing))
        rows_ND = torch.addmm(rows_ND, part, weight.t())
    return rows_ND


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


def missing_columns(width: int, rows: Tensor) -> int:
    """Columns of zeros that fill up what a GPU multiplies to a multiple of `COLUMNS`; none on a CPU."""
    return -width % COLUMNS if rows.is_cuda else 0


def combine(weights_NV: Tensor, vectors_VD: Tensor) -> Tensor:
    """The sums [N, D] of vectors with each row's weights, in the weights' type."""
    missing = missing_columns(len(vectors_VD), weights_NV)
    if missing:
        weights_NV, vectors_VD = F.pad(weights_NV, (0, missing)), F.pad(vectors_VD, (0, 0, 0, missing))
    return weights_NV @ vectors_VD.to(weights_NV.dtype)


def learned_vectors(count: int, dim: int) -> nn.Parameter:
    """[count, dim] with the initial values of every table of vectors that is learned with a model."""
    return nn.Parameter(torch.empty(count, dim).normal_(std=INIT_STD))


def add_up(values: Tensor, lens_N: Tensor) -> Tensor:
    """The sum of each row's values [ids, E], [N, E] float32; 0 where it has none."""
    summed: Tensor = torch.segment_reduce(values.float(), "sum", lengths=lens_N, unsafe=True)
    return summed


def _logarithm(values: Tensor) -> Tensor:
    return values.sign() * values.abs().log1p()


def _moments(feature: Feature, number: NumberConfig) -> tuple[float, float]:
    """(mean, standard deviation) of the transformed values, from their quantiles, or what is taken for them."""
    known = feature.statistics
    if known is None or len(known.quantiles) < 2:
        return 0.0, UNKNOWN_LOG_SCALE if number.transform == "log" else 1.0
    if number.transform == "none":
        return known.mean, known.std or 1.0
    values = _logarithm(torch.tensor(known.quantiles, dtype=torch.float64))
    return float(values.mean()), float(values.std()) or 1.0
