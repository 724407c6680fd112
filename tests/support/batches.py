"""Small random batches for tests of models, made without files or loaders."""

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from pipelines.batch import Batch
from pipelines.position import DataPosition

CONTEXT_VOCAB = 7
"""Ids of every context feature lie below this."""
NUM_ITEMS = 50
"""Item ids lie below this."""
NUM_ACTIONS = 8
"""Bits of an action mask."""


def random_batch(
    history_lens: list[int],
    num_candidates: list[int],
    *,
    context_names: tuple[str, ...] = (),
    seed: int = 0,
) -> Batch:
    """A batch with these lengths, random ids, actions, times (some unknown) and watch times (side list `play_s`)."""
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
    values = [*(random(CONTEXT_VOCAB, users) for _ in context_names), random(NUM_ITEMS, total)]
    timestamp = 1_700_000_000 + random(90, total).cumsum(0)
    timestamp = torch.where(random(10, total) == 0, -1, timestamp)
    action = (random(2**NUM_ACTIONS, total) * is_history).int()
    side = {"play_s": random(100, total).float() * is_history}
    return Batch(
        features=KeyedJaggedTensor(
            keys=[*context_names, "item_id"],
            values=torch.cat(values),
            lengths=torch.cat([torch.ones(users * len(context_names)).long(), lens]),
            stride=users,
        ),
        user_id=torch.arange(users),
        history_lens=history,
        num_candidates=candidates,
        history_lens_host=history,
        num_candidates_host=candidates,
        action=action,
        timestamp=timestamp,
        side=side,
        action_host=action,
        side_host=side,
        candidate_action=random(2**NUM_ACTIONS, int(candidates.sum())).int(),
        loss_denominator=torch.tensor(float(max(1, int(candidates.sum())))),
        position=DataPosition(order="random"),
        global_samples=users,
        global_tokens=total,
        imbalance=1.0,
    )
