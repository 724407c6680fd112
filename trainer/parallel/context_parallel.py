"""Histories shared by several ranks: each computes a part of the tokens of the same batch.

    tokens, the same on all sharing ranks -> | split | layer, layer, ... | join | -> tokens, the same on all

Between the bars a rank holds an equal part of the packed tokens, so that products, norms and what is kept for the
backward are divided by the number of ranks.  Inside attention, parts of tokens with all heads are exchanged for all
tokens with a part of the heads (DeepSpeed-Ulysses, Jacobs et al. 2023): a head's attention is then the plain operator,
whatever its mask, and every rank has as many tiles as the others.  Lookups, encoder and heads of the model are computed
by each sharing rank for the whole batch.

Gradients: every rank differentiates the same loss.  `join` hands each rank its rows' gradients times the number of
sharing ranks, so that the average over all ranks (`trainer.parallel.averaging`) is the sum over the parts; `split`
gathers the rows' gradients and takes the factor away.

Applied outside the model, by `share_histories`.  Evaluation computes as ever: each rank has samples of its own then.

Shapes: T packed tokens, S sharing ranks, R = ceil(T / S) rows of a part, D model width, H heads, K and V their sizes.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from attention_kernels import AttentionPlan, attention_backward, attention_forward
from attention_kernels.relative_bias import RelativeBiases
from trainer.models.hstu import HstuTower
from trainer.models.layer import Attention
from trainer.models.layout import SequenceLayout, candidate_rows, keep_newest, take_rows
from trainer.models.precision import compute_dtype
from trainer.parallel.mesh import Mesh

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sharing:
    """The ranks that compute one batch together."""

    group: dist.ProcessGroup
    part: int
    """Which part is this rank's."""
    parts: int
    """S, the ranks that share the samples."""

    def own(self, x: Tensor) -> Tensor:
        """This rank's rows [R, ...] of `x` [T, ...]; zeros where the last part is shorter."""
        rows = -(-x.shape[0] // self.parts)
        mine = x[self.part * rows : (self.part + 1) * rows]
        missing = rows - mine.shape[0]
        return torch.cat([mine, mine.new_zeros(missing, *x.shape[1:])]) if missing else mine.contiguous()

    def all(self, mine: Tensor, total: int) -> Tensor:
        """The `total` rows of all parts, from each rank's own."""
        gathered = mine.new_empty(self.parts * mine.shape[0], *mine.shape[1:])
        dist.all_gather_into_tensor(gathered, mine.contiguous(), group=self.group)
        return gathered[:total]

    def to_heads(self, *tensors: Tensor) -> list[Tensor]:
        """From own rows of all heads, each [R, H, size], to all rows of own heads, [S * R, H / S, size]: one
        exchange."""
        rows, heads = tensors[0].shape[0], tensors[0].shape[1] // self.parts
        sizes = [x.shape[2] for x in tensors]
        packed = torch.cat([x.reshape(rows, self.parts, heads, x.shape[2]) for x in tensors], dim=3)
        received = self._exchange(packed.transpose(0, 1).contiguous())
        return list(torch.split(received.view(self.parts * rows, heads, sum(sizes)), sizes, dim=2))

    def to_rows(self, *tensors: Tensor) -> list[Tensor]:
        """The inverse of `to_heads`."""
        rows, heads = tensors[0].shape[0] // self.parts, tensors[0].shape[1]
        sizes = [x.shape[2] for x in tensors]
        packed = torch.cat(tensors, dim=2).view(self.parts, rows, heads, sum(sizes))
        received = self._exchange(packed).transpose(0, 1).reshape(rows, self.parts * heads, sum(sizes))
        return list(torch.split(received, sizes, dim=2))

    def _exchange(self, sent: Tensor) -> Tensor:
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        return received


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, sharing: Sharing) -> Tensor:
        ctx.sharing, ctx.total = sharing, x_TD.shape[0]
        return sharing.own(x_TD)

    @staticmethod
    def backward(ctx: Any, dx_RD: Tensor) -> tuple[Tensor, None]:
        return ctx.sharing.all(dx_RD, ctx.total) / ctx.sharing.parts, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, total: int, sharing: Sharing) -> Tensor:
        ctx.sharing = sharing
        return sharing.all(x_RD, total)

    @staticmethod
    def backward(ctx: Any, dx_TD: Tensor) -> tuple[Tensor, None, None]:
        return ctx.sharing.own(dx_TD) * ctx.sharing.parts, None, None


_split: Callable[[Tensor, Sharing], Tensor] = _Split.apply
_join: Callable[[Tensor, int, Sharing], Tensor] = _Join.apply


class SharedAttention(Attention):
    """Attention of layers that hold a part of the rows each."""

    def __init__(self, sharing: Sharing) -> None:
        self._sharing, self.part = sharing, sharing.part

    def forward(
        self,
        q_RHK: Tensor,
        k_RHK: Tensor,
        v_RHV: Tensor,
        plan: AttentionPlan,
        biases: RelativeBiases | None = None,
    ) -> Tensor:
        """[R, H, V] the attention output at this rank's tokens."""
        assert biases is None, "histories with biases are not shared"
        q, k, v = self._sharing.to_heads(q_RHK, k_RHK, v_RHV)
        (out,) = self._sharing.to_rows(attention_forward(q, k, v, plan))
        return out.contiguous()

    def backward(
        self,
        dout_RHV: Tensor,
        qkv: tuple[Tensor, Tensor, Tensor],
        plan: AttentionPlan,
        biases: RelativeBiases | None = None,
        *,
        scaled: bool,
        out: tuple[Tensor, Tensor, Tensor],
    ) -> tuple[Tensor, ...]:
        """Gradients, as of `projection_backward`, at this rank's tokens; the sums are over them, too."""
        dout, q, k, v = self._sharing.to_heads(dout_RHV, *qkv)
        gradients = self._sharing.to_rows(*attention_backward(dout, q, k, v, plan))
        wide = torch.promote_types(dout.dtype, torch.float32)
        sums = []
        for place, gradient in zip(out, gradients, strict=True):
            exact = gradient.to(wide) * place if scaled else gradient.to(wide)
            place.copy_(exact)
            sums.append(exact.sum(0))
        dq, dk, dv = sums
        return dq, dk, dv


class SharedTower(HstuTower):
    """A tower whose layers hold a part of the tokens each while it is trained.  Its parameters are the given one's."""

    def __init__(self, tower: HstuTower, sharing: Sharing) -> None:
        layers = [tower._layer(index) for index in range(len(tower.layers))]
        super().__init__(layers, tower.stages, stochastic_depth=tower.stochastic_depth)
        self._sharing, self._attention = sharing, SharedAttention(sharing)

    def forward(self, x_TD: Tensor, layout: SequenceLayout) -> tuple[Tensor, SequenceLayout]:
        """The same as the plain tower; every sharing rank passes the same and gets the same."""
        if not self.training:
            return super().forward(x_TD, layout)
        x_TD, depth = x_TD.to(compute_dtype(x_TD)), 0
        weights = self._weights(x_TD.dtype)
        for stage in self.stages:
            if stage.keep_newest is not None:
                layout, rows = keep_newest(layout, stage.keep_newest)
                x_TD = take_rows(x_TD, rows)
            plan = self._layer(depth).plan(layout, stage.mask, padded=True)
            user_R = self._sharing.own(layout.user_T)
            x_RD = _split(x_TD, self._sharing)
            for _ in range(stage.num_layers):
                output_RD = self._layer(depth)(x_RD, plan, weights[depth], self._attention)
                depth += 1
                x_RD = self._skip(x_RD, output_RD, user_R, depth, layout)
            x_TD = _join(x_RD, layout.num_tokens, self._sharing)
        return x_TD, layout

    def at_candidates(self, x_TD: Tensor, layout: SequenceLayout) -> Tensor:
        """The same as the plain tower; while training, the last layer computes all rows."""
        if not self.training:
            return super().at_candidates(x_TD, layout)
        x_TD, layout = self(x_TD, layout)
        return take_rows(x_TD, candidate_rows(layout))


def share_histories(model: nn.Module, mesh: Mesh) -> None:
    """Let the towers in `model` be computed by `mesh.sharing` ranks together, in place.  Called by every rank."""
    if mesh.sharing == 1:
        return
    # Every rank takes part in making every group.
    groups = [
        dist.new_group(list(range(first, first + mesh.sharing))) for first in range(0, mesh.world_size, mesh.sharing)
    ]
    sharing = Sharing(groups[mesh.data_rank], mesh.rank % mesh.sharing, mesh.sharing)
    places = [
        (module, name)
        for module in model.modules()
        for name, child in module.named_children()
        if isinstance(child, HstuTower)
    ]
    for module, name in places:
        setattr(module, name, SharedTower(getattr(module, name), sharing))
    logger.info("histories are shared by %d ranks each; %d batches at a time", mesh.sharing, mesh.data_ranks)
