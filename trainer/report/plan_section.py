"""A run's sharding plan: bars a rank, and where its tables are."""

from embeddings.plan import Plan, size_text
from embeddings.planning.rank_bars import rank_bars
from trainer.report.tables import table


def plan_section(plan: Plan) -> str:
    """The bars of one plan, and where its tables are."""
    rows = [
        [
            name,
            f"{placement.num_embeddings:,}",
            str(placement.embedding_dim),
            size_text(placement.weight_bytes),
            placement.sharding_type,
            placement.kernel,
            ", ".join(map(str, placement.ranks)) or "all",
        ]
        for name, placement in plan.tables.items()
    ]
    placed = table(["table", "rows", "columns", "size", "sharding type", "kernel", "ranks"], rows)
    details = f"<details><summary>Tables ({len(rows)})</summary>{placed}</details>"
    if not plan.ranks:
        return f"<p>The file holds no estimates of ranks.</p>{details}"
    fullest, room = max(rank.memory_bytes for rank in plan.ranks), plan.available_bytes
    text = (
        f"<p>{len(plan.ranks):,} rank{'s' * (len(plan.ranks) > 1)}. The fullest holds {size_text(fullest)} of the "
        f"{size_text(room)} that tables may use; tables take {plan.step_ms:.3g} ms of a step, "
        f"{plan.fixed_ms:.3g} ms of them fixed costs, the same on every rank (the planner's estimates).</p>"
    )
    return f"{text}{rank_bars(plan)}{details}"
