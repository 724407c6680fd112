"""The ranker: outputs for every candidate, from its own position in the tower.

Shapes: C candidates and H events of all users, D width of the tower's outputs, K outputs of all labels.
"""

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn

from embeddings.tables import Rows, rows_by_feature
from pipelines.batches.batch import Inputs
from pipelines.selection import Selection
from trainer.models.config import ModelConfig
from trainer.models.encoding import InputEncoder
from trainer.models.heads.build import build_rank_head
from trainer.models.heads.rank_head import RankHead
from trainer.models.layout import SequenceLayout, candidate_rows, history_rows, take_rows
from trainer.models.rates import Rates
from trainer.models.transducers import MixtureOfTransducers, build_mixture


class RankerTower(nn.Module):
    """All of the ranker but its tables: encoder, tower and head, from looked-up rows to outputs."""

    def __init__(
        self,
        *,
        encoder: InputEncoder,
        tower: MixtureOfTransducers,
        head: RankHead,
        rates: Rates | None,
        max_len: int,
    ) -> None:
        super().__init__()
        self.encoder, self.tower, self.head, self.rates, self.max_len = encoder, tower, head, rates, max_len
        self.cast_first: frozenset[str] = encoder.cast_first

    def start_at(self, outputs_K: Tensor) -> None:
        """Let the untrained model give these outputs, since a rare label would need many steps to be rare.

        Where counts tell how item and user differ from them, that is all that is added at first.
        """
        self.head.start_at(outputs_K, alike=self.rates is not None)

    def check(self, inputs: Inputs) -> None:
        """Raises ValueError where a sequence is longer than the model's constant."""
        longest = self.encoder.longest(inputs)
        if longest > self.max_len:
            raise ValueError(
                f"a sequence has {longest} tokens, more than model.max_len={self.max_len}: raise max_len, or "
                "lower data.max_history_len or data.max_candidates"
            )

    def forward(self, looked_up: list[Rows], inputs: Inputs) -> Tensor:
        """The outputs of every candidate, [C, K] float32.

        Raises:
            ValueError: a sequence is longer than the model's constant.
        """
        tokens_TD, layout, of_rates_CK = self._encode(looked_up, inputs)
        return self._outputs(self.tower(tokens_TD, layout, inputs), of_rates_CK)

    def with_events(self, looked_up: list[Rows], inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The same outputs, and what the tower says at every event, [H, D], for another head.

        For a tower of one channel that sees all events and drops none.
        """
        tokens_TD, layout, of_rates_CK = self._encode(looked_up, inputs)
        rows_TD = self.tower.everywhere(tokens_TD, layout)
        outputs_CK = self._outputs(take_rows(rows_TD, candidate_rows(layout)), of_rates_CK)
        rows_H = history_rows(layout)
        # Interleaved, an event is known once its second token, the action, is.
        return outputs_CK, take_rows(rows_TD, rows_H[1::2] if self.encoder.interleave else rows_H)

    def _encode(self, looked_up: list[Rows], inputs: Inputs) -> tuple[Tensor, SequenceLayout, Tensor | None]:
        """(tokens, where they lie, what rates add to the outputs)."""
        self.check(inputs)
        of_rates_CD, of_rates_CK = (None, None) if self.rates is None else self.rates(inputs.numbers)
        tokens_TD, layout = self.encoder(rows_by_feature(looked_up), inputs, of_rates_CD)
        return tokens_TD, layout, of_rates_CK

    def _outputs(self, hidden_CD: Tensor, of_rates_CK: Tensor | None) -> Tensor:
        outputs_CK: Tensor = self.head(hidden_CD)
        return outputs_CK if of_rates_CK is None else outputs_CK + of_rates_CK


def build_ranker_tower(
    config: ModelConfig,
    *,
    selection: Selection,
    widths: Mapping[str, int],
    action_names: tuple[str, ...],
    output_bits: Sequence[int | None],
    action_rates: Sequence[float] | None = None,
    pooled: Collection[str] = (),
) -> RankerTower:
    """The ranker's tower for these columns, tables of these widths by space, `pooled` or not, and these actions.

    `output_bits` tells which action each of the head's outputs is the logit of, None of what is no action.

    Raises:
        ValueError: counts without the actions' rates to smooth them with.
    """
    rates = None
    if selection.counts:
        if action_rates is None:
            raise ValueError(
                "the data set has counts, but does not say how often each action is taken in its training split "
                "(statistics.splits.train.positives): state it, or set model.input.counts=[]"
            )
        rates = Rates(selection.counts, action_rates=action_rates, output_bits=output_bits, dim=config.dim)
    return RankerTower(
        encoder=InputEncoder(
            selection,
            widths=widths,
            config=config.input,
            dim=config.dim,
            num_actions=len(action_names),
            pooled=pooled,
        ),
        tower=build_mixture(config, selection=selection, action_names=action_names),
        head=build_rank_head(
            config.head,
            dim=sum(channel.dim for channel in config.channels) or config.dim,
            num_outputs=len(output_bits),
        ),
        rates=rates,
        max_len=config.max_len,
    )
