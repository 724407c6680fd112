"""From ids to rows on all ranks: what they send each other, sums of bags, caches, keys of unbounded ids."""
