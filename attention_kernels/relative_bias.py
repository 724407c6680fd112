"""Causal SiLU attention with a bias for how far a key lies back, in places and in time, in plain PyTorch.

    out[q] = sum over k <= q of silu(scale <q, k> + position[q - k] + time[bucket of |t_q - t_k|]) / max_len v[k]

(Zhai et al., "Actions Speak Louder than Words", ICML 2024, the relative attention bias of HSTU.)  The time of a query
is stated apart from its key's: it may be that of what is asked for, the next event.

The definition that kernels are tested against: sequences are padded to the longest of the batch, and scores are whole
matrices.  Reads no value on the host.

Legend: T packed positions, B users, N places of the longest sequence, H heads, K query-key size, V value size,
M position biases, G time buckets.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from attention_kernels.attention.plan import AttentionPlan
from attention_kernels.rectangle import Rectangle, make_rectangle

LOG_BUCKET_WIDTH = 0.301
"""Width of a time bucket in natural logarithms of seconds, as in the HSTU paper: about a factor 1.35."""
_NEVER = 2**63 - 1
_UNSEEN = -1e30
"""Bias of a key that a query does not see: SiLU and its slope are 0 there."""


class RelativeBiases(NamedTuple):
    """A layer's biases."""

    position: Tensor
    """[H, M] by how many places a key lies back; distances of M places and more share the last."""
    time: Tensor
    """[H, G] by time bucket."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Places:
    """Where a batch's pairs of query and key stand to each other: made once, read by every layer."""

    rectangle: Rectangle
    buckets_BNN: Tensor
    """Time bucket of each pair (query, key), int64."""
    distance_NN: Tensor
    """q - k, below 0 for what is not seen."""


def log_bucket(seconds: Tensor, num_buckets: int) -> Tensor:
    """Logarithmic bucket of distances in seconds, int64 in [0, num_buckets); negative distances count as none.

    The same on every device: in float32 a GPU, which multiplies by the reciprocal, puts a few seconds elsewhere.
    """
    return (torch.log(seconds.clamp(min=1).double()) / LOG_BUCKET_WIDTH).long().clamp(max=num_buckets - 1)


def bucket_starts(num_buckets: int) -> Tensor:
    """[G] int64 in host memory: the smallest distance that `log_bucket` puts into each bucket; 2**63 - 1 where there is
    none."""
    wanted = torch.arange(num_buckets, device="cpu")
    # Behind every distance that is too small, by halving.
    small, large = torch.zeros_like(wanted), torch.full_like(wanted, 2**62)
    while bool((large - small > 1).any()):
        middle = (small + large) // 2
        reached = log_bucket(middle, num_buckets) >= wanted
        small, large = torch.where(reached, small, middle), torch.where(reached, middle, large)
    return torch.where(log_bucket(large, num_buckets) >= wanted, large, _NEVER)


def relative_attention(
    q_THK: Tensor, k_THK: Tensor, v_THV: Tensor, plan: AttentionPlan, biases: RelativeBiases
) -> Tensor:
    """The formula above, [T, H, V] in v's type, of a plan with times; scores in float32 (float64 for float64).
    Differentiable in all five tensors."""
    rectangle = _places(plan).rectangle
    q_HBNK, k_HBNK, v_HBNV = _padded(rectangle, q_THK * plan.scale_of(q_THK), k_THK, v_THV)
    weight_HBNN = F.silu(_scores(q_HBNK, k_HBNK, plan, biases))
    out_HBNV = weight_HBNN.to(v_THV.dtype) @ v_HBNV / plan.max_len
    return _packed(rectangle, out_HBNV).to(v_THV.dtype)


def relative_attention_backward(
    dout_THV: Tensor, q_THK: Tensor, k_THK: Tensor, v_THV: Tensor, plan: AttentionPlan, biases: RelativeBiases
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and of both biases, each in its tensor's type."""
    places, scale, dtype = _places(plan), plan.scale_of(q_THK), q_THK.dtype
    scaled = (q_THK * scale, k_THK, v_THV, dout_THV / plan.max_len)
    q_HBNK, k_HBNK, v_HBNV, dout_HBNV = _padded(places.rectangle, *scaled)
    score_HBNN = _scores(q_HBNK, k_HBNK, plan, biases)
    dv_HBNV = F.silu(score_HBNN).to(dtype).transpose(2, 3) @ dout_HBNV
    dweight_HBNN = (dout_HBNV @ v_HBNV.transpose(2, 3)).to(score_HBNN.dtype)
    # By one pass over the scores, where PyTorch's public functions take six.
    dscore_HBNN = torch.ops.aten.silu_backward(dweight_HBNN, score_HBNN)
    dscore = dscore_HBNN.to(dtype)
    gradients = (dscore @ k_HBNK * scale, dscore.transpose(2, 3) @ q_HBNK, dv_HBNV)
    distance_NN = places.distance_NN.clamp(0, biases.position.shape[1] - 1)
    of_biases = (
        _sum_by_bucket(dscore_HBNN.sum(1), distance_NN, biases.position.shape[1]),
        _sum_by_bucket(dscore_HBNN, places.buckets_BNN, biases.time.shape[1]),
    )
    return *(_packed(places.rectangle, x).to(dtype) for x in gradients), *of_biases


def _scores(q_HBNK: Tensor, k_HBNK: Tensor, plan: AttentionPlan, biases: RelativeBiases) -> Tensor:
    """[H, B, N, N] of scaled queries; far below 0 where a query does not see a key."""
    places, position_HM = _places(plan), biases.position
    position_HNN = _Bias.apply(position_HM, places.distance_NN.clamp(0, position_HM.shape[1] - 1))
    # What is not seen is said in the smallest of the matrices: each pass over all scores costs as much as a product.
    position_HNN = position_HNN.masked_fill(places.distance_NN < 0, _UNSEEN)
    bias_HBNN = position_HNN[:, None] + _Bias.apply(biases.time, places.buckets_BNN)
    score_HBNN: Tensor = (q_HBNK @ k_HBNK.transpose(2, 3)).to(bias_HBNN.dtype) + bias_HBNN
    return score_HBNN


def _padded(rectangle: Rectangle, *tensors: Tensor) -> list[Tensor]:
    """[T, H, size] -> [H, B, N, size]."""
    return [rectangle.pad(x).permute(2, 0, 1, 3) for x in tensors]


def _packed(rectangle: Rectangle, x_HBNV: Tensor) -> Tensor:
    """[H, B, N, size] -> [T, H, size]."""
    x_TW = rectangle.take(x_HBNV.permute(1, 2, 0, 3).flatten(2))
    return x_TW.view(x_TW.shape[0], x_HBNV.shape[0], x_HBNV.shape[3])


def _places(plan: AttentionPlan) -> _Places:
    """Where the plan's pairs stand."""
    times = plan.times
    assert times is not None
    if "places" not in times.made:
        index_T = torch.arange(times.happened.shape[0], device=plan.offsets.device)
        # Positions behind the last sequence are one user's more, and lie outside.
        user_T = torch.bucketize(index_T, plan.offsets[1:], right=True)
        start_T = plan.offsets[user_T]
        num_users = plan.offsets.shape[0] - 1
        rectangle = make_rectangle(user_T, index_T - start_T, num_users=num_users, longest=times.longest)
        key_BN, query_BN = rectangle.pad(times.happened), rectangle.pad(times.asked)
        apart_BNN = (query_BN[:, :, None] - key_BN[:, None, :]).abs()
        index_N = torch.arange(times.longest, device=plan.offsets.device)
        times.made["places"] = _Places(
            rectangle=rectangle,
            buckets_BNN=log_bucket(apart_BNN, times.bucket_starts.shape[0]),
            distance_NN=index_N[:, None] - index_N[None, :],
        )
    places: _Places = times.made["places"]
    return places


class _Bias(torch.autograd.Function):
    """`bias_HG[:, buckets]`."""

    @staticmethod
    def forward(ctx: Any, bias_HG: Tensor, buckets: Tensor) -> Tensor:
        ctx.save_for_backward(buckets)
        ctx.num_buckets = bias_HG.shape[1]
        bias: Tensor = bias_HG.index_select(1, buckets.flatten()).unflatten(1, buckets.shape)
        return bias

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (dbias,), (buckets,) = gradients, ctx.saved_tensors
        return _sum_by_bucket(dbias, buckets, ctx.num_buckets), None


def _sum_by_bucket(x: Tensor, buckets: Tensor, num_buckets: int) -> Tensor:
    """[H, ...] -> [H, G].  Adds up by query first: millions of pairs fall into few buckets."""
    of_query = x.new_zeros(*x.shape[:-1], num_buckets)
    of_query.scatter_add_(-1, buckets.expand_as(x), x)
    return of_query.flatten(1, -2).sum(1)
