"""The stream of global batches: which samples, how long, on which rank.  Metadata only; a pure function of position.

    SampleOrder of each source -> mix, or one part after another -> slice of a global batch -> lengths -> ranks

Each step from a position yields a batch's plan and the next position, so resuming is not a feature but a consequence.
Samples and lengths do not depend on the number of ranks (but see scope="rank" of StochasticLengthConfig).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from pipelines.config import DataConfig
from pipelines.storage.columns import IntArray
from pipelines.storage.vocabulary import check_same_ids, vocabularies
from pipelines.stream.balance import Cost, assign, imbalance
from pipelines.stream.order import References, SampleOrder, concatenate
from pipelines.stream.position import DataPosition, SourcePosition
from pipelines.stream.randomness import random_uniform
from pipelines.stream.stochastic_length import CUT, FILL, balanced_lens, load, plain_lens

MIX = 21


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPlan:
    """One rank's share of a global batch, before anything of it is read."""

    samples: References
    """This rank's samples, in global order."""
    history: IntArray
    """Events kept of each sample's history."""
    candidates: IntArray
    """Candidates kept of each sample."""
    global_samples: int
    """Samples of the global batch."""
    global_tokens: int
    """Events and candidates of the global batch."""
    global_candidates: int
    """Candidates of the global batch."""
    global_followed: int
    """Events of the global batch that another event or a candidate follows."""
    imbalance: float
    """Largest over mean modelled cost of the ranks."""
    position: DataPosition
    """State after this batch."""


class GlobalBatches:
    """Plans of one rank's shares, from a position to the end of the stream."""

    def __init__(
        self,
        config: DataConfig,
        orders: Sequence[SampleOrder],
        *,
        split: Literal["train", "eval"],
        rank: int,
        world_size: int,
        cost: Cost,
    ) -> None:
        self._config = config
        self._orders = orders
        self._train = split == "train"
        self._rank = rank
        self._world_size = world_size
        self._cost = cost
        weights = np.array(config.mix_weights if self._train and config.mix_weights else [1.0])
        self._mix_bounds = np.cumsum(weights / weights.sum())
        self._mixed = self._train and bool(config.mix_paths)
        stream = " ".join([split, *map(str, weights)])
        self.start = DataPosition(
            order=(stream, *(order.fingerprint() for order in orders)),
            vocabularies=vocabularies(orders[0].info),
            sources=(SourcePosition(),) * len(orders),
        )

    def plans(self, position: DataPosition | None = None) -> Iterator[BatchPlan]:
        """Plans from `position` on; see `check`."""
        position = self.resumed(position)
        while sum(self.left(position)):
            plan = self._plan(position)
            yield plan
            position = plan.position

    def resumed(self, position: DataPosition | None) -> DataPosition:
        """The position with the parts that have come in since; None is the start.

        Raises:
            ValueError: it belongs to another order of samples, or to ids that mean something else.
        """
        if position is None:
            return self.start
        known = len(position.order)
        if position.order != self.start.order[:known] or (self._mixed and known < len(self.start.order)):
            raise ValueError(
                "the saved data position belongs to other data or another order of samples: keep the data set, "
                "data.seed, data.order, data.window_samples, data.shuffle_run and the mix, or start a new run (saved: "
                f"{position.order}; now: {self.start.order})"
            )
        check_same_ids(position.vocabularies, self._orders[0].info, data=self._config.path, other="the saved position")
        further = (SourcePosition(),) * (len(self.start.sources) - len(position.sources))
        return replace(
            position,
            order=self.start.order,
            vocabularies=self.start.vocabularies,
            sources=position.sources + further,
        )

    def part_of(self, position: DataPosition) -> int:
        """The part that comes next after `position`; the number of parts at the end."""
        unfinished = [each.epoch < self._config.num_epochs for each in position.sources]
        return unfinished.index(True) if True in unfinished else len(unfinished)

    def left(self, position: DataPosition) -> list[int]:
        """Samples that come after `position`, of each part in turn, or of the mix.

        Counted of each part, for each may have been begun with another number of passes.
        """
        config = self._config
        if not self._train:
            return [self._orders[0].num_samples - position.samples]
        room = math.inf if config.max_samples is None else max(0, config.max_samples - position.samples)
        if self._mixed:
            return [int(room)]
        left = []
        for order, at in zip(self._orders, position.sources, strict=True):
            of_part = order.num_samples * (config.num_epochs - at.epoch) - at.sample
            left.append(int(min(max(0, of_part), room)))
            room -= left[-1]
        return left

    def steps_left(self, position: DataPosition) -> int:
        """Batches that come after `position`, where their size is given in samples."""
        return sum(math.ceil(samples / self._config.global_batch_size) for samples in self.left(position))

    def _plan(self, position: DataPosition) -> BatchPlan:
        """The batch that begins at `position`."""
        config = self._config
        size = config.global_batch_size if self._train else config.eval_batch_size or config.global_batch_size
        samples = self._take(position, min(size, sum(self.left(position))))
        history = np.minimum(samples.history, config.max_history_len)
        most = config.max_candidates
        candidates = samples.candidates if most is None else np.minimum(samples.candidates, most)
        if self._train and config.global_batch_tokens is not None:
            fitting = int(np.searchsorted(np.cumsum(history + candidates), config.global_batch_tokens, side="right"))
            fitting = max(fitting, 1)
            samples = samples.select(slice(fitting))
            history, candidates = history[:fitting], candidates[:fitting]
        following = self._advance(position, samples)
        if self._train and config.stochastic_length.mode != "off":
            history, rank, following = self._shorten(samples, history, candidates, following)
        else:
            rank = self._assign(samples, history, candidates)
        mine = np.flatnonzero(rank == self._rank)
        return BatchPlan(
            samples=samples.select(mine),
            history=history[mine],
            candidates=candidates[mine],
            global_samples=len(samples),
            global_tokens=int(history.sum() + candidates.sum()),
            global_candidates=int(candidates.sum()),
            global_followed=int(np.maximum(history - (candidates == 0), 0).sum()),
            imbalance=imbalance(self._cost(history, candidates), rank, self._world_size),
            position=following,
        )

    def _assign(self, samples: References, history: IntArray, candidates: IntArray) -> IntArray:
        """The rank of each sample."""
        return assign(
            self._cost(history, candidates),
            self._world_size,
            mode=self._config.balance,
            slack=self._config.balance_slack,
            keep_neighbours=self._config.shuffle_run > 1,
        )

    def _take(self, position: DataPosition, count: int) -> References:
        """The next `count` samples of the stream; fewer where a part ends, so that no batch reaches into two."""
        if not self._mixed:
            current = self.part_of(position) if self._train else 0
            order, at = self._orders[current], position.sources[current]
            passes = self._config.num_epochs if self._train else 1
            left = order.num_samples * (passes - at.epoch) - at.sample
            references = order.take(at, min(count, left))
            return replace(references, source=np.full(len(references), current))
        draws = random_uniform((self._config.seed, MIX), np.arange(position.samples, position.samples + count))
        choice = np.searchsorted(self._mix_bounds[:-1], draws, side="right")
        parts = []
        for source, order in enumerate(self._orders):
            number = int(np.count_nonzero(choice == source))
            if number:
                part = order.take(position.sources[source], number)
                parts.append(replace(part, source=np.full(number, source)))
        places = np.argsort(np.argsort(choice, kind="stable"), kind="stable")
        return concatenate(parts).select(places)

    def _advance(self, position: DataPosition, samples: References) -> DataPosition:
        """The position after these samples, but for the state of stochastic length."""
        counts = np.bincount(samples.source, minlength=len(self._orders)).tolist()
        sources = tuple(
            order.advance(source, count)
            for order, source, count in zip(self._orders, position.sources, counts, strict=True)
        )
        return replace(position, sources=sources, samples=position.samples + len(samples), batches=position.batches + 1)

    def _shorten(
        self, samples: References, history: IntArray, candidates: IntArray, position: DataPosition
    ) -> tuple[IntArray, IntArray, DataPosition]:
        """Kept history lengths, ranks, and the position with the state of load balancing brought up to date."""
        config, longest = self._config.stochastic_length, self._config.max_history_len
        cut_draws = self._draws(samples, CUT)
        plain = plain_lens(history, cut_draws, longest, config.alpha)
        if config.mode == "plain":
            return plain, self._assign(samples, plain, candidates), position
        by_rank = config.scope == "rank"
        rank = self._assign(samples, plain, candidates)
        kept = plain
        if position.target_load:
            groups = self._world_size if by_rank else 1
            kept = balanced_lens(
                history,
                self._draws(samples, FILL),
                rank if by_rank else np.zeros_like(rank),
                position.target_load * len(samples) / groups,
                max_history_len=longest,
                config=config,
            )
            rank = rank if by_rank else self._assign(samples, kept, candidates)
        return kept, rank, self._recalibrate(position, float(load(plain, config.gamma).sum()), len(samples))

    def _recalibrate(self, position: DataPosition, plain_load: float, count: int) -> DataPosition:
        """Add a batch's cost under the plain rule, and set the budget from the sum when that is due."""
        config = self._config.stochastic_length
        total, number = position.load_sum + plain_load, position.load_samples + count
        since = position.batches - config.warmup_batches
        if since >= 0 and since % config.recalibration_batches == 0:
            return replace(position, target_load=total / number, load_sum=0.0, load_samples=0)
        return replace(position, load_sum=total, load_samples=number)

    def _draws(self, samples: References, purpose: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """A uniform number for each sample, different in every pass."""
        seed = self._config.seed
        draws = np.empty(len(samples))
        keys = samples.source * (int(samples.epoch.max()) + 1) + samples.epoch
        for key in np.unique(keys):
            chosen = keys == key
            first = int(np.argmax(chosen))
            source, epoch = int(samples.source[first]), int(samples.epoch[first])
            draws[chosen] = random_uniform((seed, purpose, source, epoch), samples.sample[chosen])
        return draws
