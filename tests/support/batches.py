"""Small random batches for tests of models, made without files or loaders."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from pipelines.batch import Batch
from pipelines.packed import Contents, bag_lens, pack
from pipelines.position import DataPosition

CONTEXT_VOCAB = 7
"""Ids of every context feature lie below this."""
NUM_ITEMS = 50
"""Item ids lie below this."""
NUM_ACTIONS = 8
"""Bits of an action mask."""


def random_batch(
    history_lens: list[int], num_candidates: list[int], *, context_names: tuple[str, ...] = (), seed: int = 0
) -> Batch:
    """A batch with these lengths, random ids, actions, times (some unknown), watch times (side list `play_s`) and
    surfaces (`tab`, 0 to 5)."""
    arrays = random_arrays(history_lens, num_candidates, num_context=len(context_names), seed=seed)
    return batch_of(arrays, context_names=context_names)


def batch_of(arrays: dict[str, Tensor], *, context_names: tuple[str, ...] = ()) -> Batch:
    """The batch of these arrays, named as in `pipelines.packed`."""
    memory, places = pack({name: (array.numpy().dtype, [array.numpy()]) for name, array in arrays.items()})
    contents = Contents(
        size_bytes=memory.numel(),
        places=places,
        context_names=context_names,
        position=DataPosition(order="random"),
        global_samples=len(arrays["user_id"]),
        global_tokens=len(arrays["action"]),
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
    history_lens: list[int], num_candidates: list[int], *, num_context: int = 0, seed: int = 0
) -> dict[str, Tensor]:
    """The arrays of `random_batch`."""
    generator = torch.Generator().manual_seed(seed)
    history, candidates = torch.tensor(history_lens).long(), torch.tensor(num_candidates).long()
    lens, users = history + candidates, len(history_lens)
    total = int(lens.sum())

    def random(high: int, size: int) -> Tensor:
        return torch.randint(high, (size,), generator=generator)

    is_history = torch.cat(
        [torch.arange(int(n)) < int(h) for n, h in zip(lens, history, strict=True)]
        or [torch.zeros(0, dtype=torch.bool)]
    )
    ids = torch.cat([*(random(CONTEXT_VOCAB, users) for _ in range(num_context)), random(NUM_ITEMS, total)])
    timestamp = 1_700_000_000 + random(90, total).cumsum(0)
    timestamp = torch.where(random(10, total) == 0, -1, timestamp)
    return {
        "ids": ids,
        "bag_lens": torch.from_numpy(bag_lens([users] * num_context + [total])),
        "user_id": torch.arange(users),
        "history_lens": history,
        "num_candidates": candidates,
        "action": (random(2**NUM_ACTIONS, total) * is_history).int(),
        "timestamp": timestamp,
        "side/play_s": random(100, total).float() * is_history,
        "side/tab": (random(6, total) * is_history).int(),
        "candidate_action": random(2**NUM_ACTIONS, int(candidates.sum())).int(),
        "loss_denominator": torch.tensor([float(max(1, int(candidates.sum())))]),
    }
