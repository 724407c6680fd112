"""Small random batches for tests of models, made without files or loaders."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from pipelines.batches.batch import Batch
from pipelines.batches.packed import Contents, bag_lens, pack
from pipelines.known_numbers import NumberStatistics
from pipelines.selection import Feature, Selection
from pipelines.stream.position import DataPosition

CONTEXT_VOCAB = 7
"""Ids of every context feature lie below this."""
NUM_ITEMS = 50
"""Item ids lie below this."""
NUM_ACTIONS = 8
"""Bits of an action mask."""
NUM_TABS = 6
"""Ids of events' tabs and tags lie below this."""
PLAY_S = NumberStatistics(count=80, missing=20, mean=50.0, std=29.0, quantiles=tuple(range(0, 101, 10)))
"""What a data set would say of how long events were watched."""


def small_selection(context_names: tuple[str, ...] = (), *, columns: bool = False) -> Selection:
    """The features of `random_batch` that a model reads: context, items, and with `columns` those of events alone."""
    features = [Feature(name="item_id", parts=("event", "candidate"), kind="id", space="item")]
    if columns:
        features.append(Feature(name="play_s", parts=("event",), kind="number", space=None, statistics=PLAY_S))
        features.append(Feature(name="tab", parts=("event",), kind="id", space="tab"))
        features.append(Feature(name="tags", parts=("event",), kind="ids", space="tab"))
        features.append(Feature(name="price", parts=("candidate",), kind="number", space=None))
    features += [Feature(name=f"sample.{name}", parts=("sample",), kind="id", space=name) for name in context_names]
    return Selection(features=tuple(features))


def random_batch(
    history_lens: list[int], num_candidates: list[int], *, context_names: tuple[str, ...] = (), seed: int = 0
) -> Batch:
    """A batch with these lengths, random ids, actions, times (some unknown) and columns."""
    return batch_of(random_arrays(history_lens, num_candidates, context_names=context_names, seed=seed))


def batch_of(arrays: dict[str, Tensor]) -> Batch:
    """The batch of these arrays, named as in `pipelines.batches.packed`, but for the ids: `ids/NAME` a feature."""
    ids = {name.removeprefix("ids/"): array for name, array in arrays.items() if name.startswith("ids/")}
    packed = {name: array.numpy() for name, array in arrays.items() if not name.startswith("ids/")}
    packed["ids"] = torch.cat(list(ids.values())).numpy()
    packed["bag_lens"] = bag_lens([len(each) for each in ids.values()])
    memory, places = pack({name: (array.dtype, [array]) for name, array in packed.items()})
    contents = Contents(
        size_bytes=memory.numel(),
        places=places,
        lookups=tuple(ids),
        position=DataPosition(order=("random",)),
        global_samples=len(arrays["user_id"]),
        global_tokens=len(arrays["timestamp"]),
        imbalance=1.0,
    )
    return Batch(contents, memory)


def looked_up(rows: Mapping[str, Tensor]) -> dict[str, JaggedTensor]:
    """Rows of each feature as a lookup gives them, for what reads no lengths.  TorchRec wants whole numbers there."""
    return {
        name: JaggedTensor(values=values, lengths=torch.zeros(3, dtype=torch.int64, device=values.device))
        for name, values in rows.items()
    }


def random_arrays(
    history_lens: list[int], num_candidates: list[int], *, context_names: tuple[str, ...] = (), seed: int = 0
) -> dict[str, Tensor]:
    """The arrays of `random_batch`."""
    generator = torch.Generator().manual_seed(seed)
    history, candidates = torch.tensor(history_lens).long(), torch.tensor(num_candidates).long()
    users, events, scored = len(history_lens), sum(history_lens), sum(num_candidates)

    def random(high: int, size: int) -> Tensor:
        return torch.randint(high, (size,), generator=generator)

    timestamp = 1_700_000_000 + torch.cat([random(90, events).cumsum(0), 90 * events + random(90, scored).cumsum(0)])
    timestamp = torch.where(random(10, events + scored) == 0, -1, timestamp)
    tags = random(3, events)
    missing = torch.tensor(float("nan"))
    return {
        "ids/item_id": random(NUM_ITEMS, events + scored),
        **{f"ids/sample.{name}": random(CONTEXT_VOCAB, users) for name in context_names},
        "ids/tab": random(NUM_TABS, events),
        "ids/tags": random(NUM_TABS, int(tags.sum())),
        "lens/tags": tags,
        "number/play_s": torch.where(random(5, events) == 0, missing, random(100, events).float()),
        "number/price": torch.where(random(5, scored) == 0, missing, random(100, scored).float()),
        "user_id": torch.arange(users),
        "history_lens": history,
        "num_candidates": candidates,
        "action": random(2**NUM_ACTIONS, events).int(),
        "timestamp": timestamp,
        "candidate_action": random(2**NUM_ACTIONS, scored).int(),
        "loss_denominator": torch.tensor([float(max(1, scored))]),
    }


def random_rows(batch: Batch, widths: Mapping[str, int]) -> dict[str, JaggedTensor]:
    """Rows of every feature of ids, of the width of its space's table, on the batch's device."""
    keys = list(batch.features.keys())
    context = tuple(key.removeprefix("sample.") for key in keys if key.startswith("sample."))
    spaces = {feature.name: feature.space or "" for feature in small_selection(context, columns=True).features}
    device = batch.inputs.user_id.device
    sizes = {key: len(batch.inputs.ids_host(key)) for key in keys}
    return looked_up({key: torch.randn(size, widths[spaces[key]], device=device) for key, size in sizes.items()})
