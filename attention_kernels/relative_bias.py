"""Causal SiLU attention with a bias for how far a key lies back, in places and in time, in plain PyTorch.

    out[q] = sum over k <= q of silu(scale <q, k> + position[q - k] + time[bucket of |t_q - t_k|]) / max_len v[k]

(Zhai et al., "Actions Speak Louder than Words", ICML 2024, the relative attention bias of HSTU.)  The time of a query
is stated apart from its key's: it may be that of what is asked for, the next event.

Sequences are padded to the longest of the batch, and scores are whole matrices: made for sequences of hundreds.

Legend: T packed positions, B users, N places of the longest sequence, H heads, K query-key size, V value size,
M position biases, G time buckets.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

LOG_BUCKET_WIDTH = 0.301
"""Width of a time bucket in natural logarithms of seconds, as in the HSTU paper: about a factor 1.35."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RelativePlaces:
    """Where a batch's pairs of query and key stand to each other: made once, read by every layer."""

    padded_T: Tensor
    """Each token's place in the padded batch, user * N + index."""
    buckets_BNN: Tensor
    """Time bucket of each pair (query, key), int64."""
    distance_NN: Tensor
    """q - k, 0 where that is below."""
    causal_NN: Tensor
    """1 where k <= q, else 0; float32."""


def make_places(
    user_T: Tensor,
    index_T: Tensor,
    time_T: Tensor,
    asked_T: Tensor,
    *,
    num_users: int,
    longest: int,
    num_buckets: int,
) -> RelativePlaces:
    """The places of sequences of which `user_T` and `index_T` say whose each token is, and where it stands in it.

    Args:
        time_T: [T] int64 seconds, the times of keys.
        asked_T: [T] likewise, the times of queries.
        num_users: B.
        longest: N.
        num_buckets: G; larger distances share the last bucket.
    """
    padded_T = user_T * longest + index_T
    key_BN, query_BN = (
        seconds.new_zeros(num_users * longest).index_copy_(0, padded_T, seconds).view(num_users, longest)
        for seconds in (time_T, asked_T)
    )
    distance_BNN = (query_BN[:, :, None] - key_BN[:, None, :]).abs()
    index = torch.arange(longest, device=user_T.device)
    distance_NN = index[:, None] - index[None, :]
    return RelativePlaces(
        padded_T=padded_T,
        buckets_BNN=log_bucket(distance_BNN, num_buckets),
        distance_NN=distance_NN.clamp(min=0),
        causal_NN=(distance_NN >= 0).float(),
    )


def log_bucket(seconds: Tensor, num_buckets: int) -> Tensor:
    """Logarithmic bucket of distances in seconds, int64 in [0, num_buckets); negative distances count as none."""
    return (torch.log(seconds.clamp(min=1).float()) / LOG_BUCKET_WIDTH).long().clamp(max=num_buckets - 1)


def relative_attention(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THV: Tensor,
    places: RelativePlaces,
    *,
    position_HM: Tensor,
    time_HG: Tensor,
    scale: float,
    max_len: int,
) -> Tensor:
    """The formula above, [T, H, V] in v's type; scores in float32 (float64 for float64).  Differentiable in all five
    tensors.  Distances of M places and more share the last position bias."""
    q_BHNK, k_BHNK, v_BHNV = (_padded(x, places) for x in (q_THK, k_THK, v_THV))
    distance_NN = places.distance_NN.clamp(max=position_HM.shape[1] - 1)
    score_BHNN = (q_BHNK @ k_BHNK.transpose(2, 3)).to(position_HM.dtype) * scale
    bias_BHNN = _TimeBias.apply(time_HG, places.buckets_BNN)
    score_BHNN = score_BHNN + position_HM[:, distance_NN] + bias_BHNN
    weight_BHNN = F.silu(score_BHNN) * (places.causal_NN.to(score_BHNN.dtype) / max_len)
    out_BHNV = weight_BHNN.to(v_THV.dtype) @ v_BHNV
    return out_BHNV.transpose(1, 2).flatten(0, 1)[places.padded_T].to(v_THV.dtype)


def _padded(x_THK: Tensor, places: RelativePlaces) -> Tensor:
    """[B, H, N, K], zero where a sequence has ended."""
    users, longest, _ = places.buckets_BNN.shape
    padded: Tensor = x_THK.new_zeros(users * longest, *x_THK.shape[1:]).index_copy(0, places.padded_T, x_THK)
    by_user: Tensor = padded.unflatten(0, (users, longest))
    return by_user.transpose(1, 2)


class _TimeBias(torch.autograd.Function):
    """`time_HG[h, buckets_BNN]`.  The backward adds up by query first: millions of pairs fall into few buckets."""

    @staticmethod
    def forward(ctx: Any, time_HG: Tensor, buckets_BNN: Tensor) -> Tensor:
        ctx.save_for_backward(buckets_BNN)
        ctx.num_buckets = time_HG.shape[1]
        return torch.stack([biases_G[buckets_BNN] for biases_G in time_HG], dim=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (dbias_BHNN,), (buckets_BNN,) = gradients, ctx.saved_tensors
        sums_BNG = (
            dbias.new_zeros(*dbias.shape[:2], ctx.num_buckets).scatter_add_(2, buckets_BNN, dbias)
            for dbias in dbias_BHNN.unbind(1)
        )
        return torch.stack([sums.sum((0, 1)) for sums in sums_BNG]), None
