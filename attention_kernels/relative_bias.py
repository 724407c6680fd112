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

from attention_kernels.rectangle import Rectangle

LOG_BUCKET_WIDTH = 0.301
"""Width of a time bucket in natural logarithms of seconds, as in the HSTU paper: about a factor 1.35."""
_UNSEEN = -1e30
"""Bias of a key that a query does not see: SiLU and its slope are 0 there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RelativePlaces:
    """Where a batch's pairs of query and key stand to each other: made once, read by every layer."""

    rectangle: Rectangle
    """Where each token lies in the padded batch."""
    buckets_BNN: Tensor
    """Time bucket of each pair (query, key), int64."""
    distance_NN: Tensor
    """q - k, 0 where that is below."""
    causal_NN: Tensor
    """k <= q."""


def make_places(rectangle: Rectangle, time_T: Tensor, asked_T: Tensor, *, num_buckets: int) -> RelativePlaces:
    """The places of sequences that lie so.

    Args:
        rectangle: of all tokens.
        time_T: [T] int64 seconds, the times of keys.
        asked_T: [T] likewise, the times of queries.
        num_buckets: G; larger distances share the last bucket.
    """
    key_BN, query_BN = rectangle.pad(time_T), rectangle.pad(asked_T)
    distance_BNN = (query_BN[:, :, None] - key_BN[:, None, :]).abs()
    index = torch.arange(rectangle.longest, device=time_T.device)
    distance_NN = index[:, None] - index[None, :]
    return RelativePlaces(
        rectangle=rectangle,
        buckets_BNN=log_bucket(distance_BNN, num_buckets),
        distance_NN=distance_NN.clamp(min=0),
        causal_NN=distance_NN >= 0,
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
    q_HBNK, k_HBNK, v_HBNV = (places.rectangle.pad(x).permute(2, 0, 1, 3) for x in (q_THK * scale, k_THK, v_THV))
    position_HNN = _Bias.apply(position_HM, places.distance_NN.clamp(max=position_HM.shape[1] - 1))
    # What is not seen is said in the smallest of the matrices: each pass over all scores costs as much as a product.
    bias_HBNN = position_HNN.masked_fill(~places.causal_NN, _UNSEEN)[:, None] + _Bias.apply(time_HG, places.buckets_BNN)
    weight_HBNN = F.silu((q_HBNK @ k_HBNK.transpose(2, 3)).to(bias_HBNN.dtype) + bias_HBNN)
    out_HBNV = weight_HBNN.to(v_THV.dtype) @ v_HBNV / max_len
    out_TW = places.rectangle.take(out_HBNV.permute(1, 2, 0, 3).flatten(2))
    return out_TW.view(v_THV.shape).to(v_THV.dtype)


class _Bias(torch.autograd.Function):
    """`bias_HG[:, buckets]`.  The backward adds up by query first: millions of pairs fall into few buckets."""

    @staticmethod
    def forward(ctx: Any, bias_HG: Tensor, buckets: Tensor) -> Tensor:
        ctx.save_for_backward(buckets)
        ctx.num_buckets = bias_HG.shape[1]
        bias: Tensor = bias_HG.index_select(1, buckets.flatten()).unflatten(1, buckets.shape)
        return bias

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (dbias,), (buckets,) = gradients, ctx.saved_tensors
        of_query = dbias.new_zeros(*dbias.shape[:-1], ctx.num_buckets)
        of_query.scatter_add_(-1, buckets.expand_as(dbias), dbias)
        return of_query.flatten(1, -2).sum(1), None
