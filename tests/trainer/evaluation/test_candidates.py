"""The table that sets a model beside the baseline: what it shows, and what it says of actions that are hardly taken."""

import pytest

from trainer.evaluation.candidates import comparison_table, ranking_table
from trainer.labels.regression import Regression


def metrics(positives: float, auc: float) -> dict[str, float]:
    names = {"ne": 0.9, "auc": auc, "auc_95": 0.012, "gauc": 0.55, "positives": positives}
    return {f"{name}/click": value for name, value in names.items()}


def test_both_sides_stand_in_one_row_with_the_number_of_positives() -> None:
    table = comparison_table(metrics(1234, 0.75), metrics(1234, 0.7), ("click",)).splitlines()
    assert len(table) == 3
    assert table[2].split() == [
        *("click", "1,234", "0.9000", "0.9000", "0.7500", "0.0120", "0.7000", "+0.0500", "0.5500", "0.5500")
    ]
    assert len(table[0]) == len(table[2])


def test_a_handful_of_positives_is_said_to_tell_nothing() -> None:
    few = comparison_table(metrics(99, 0.75), metrics(99, 0.7), ("click",)).splitlines()
    assert few[3] == "fewer than 100 positives, too few to say anything: click"


@pytest.mark.parametrize("error", [0.1234, 98_765.4321, 1.9862e10, 2e38])
def test_large_errors_stand_apart_from_the_next_column(error: float) -> None:
    kind = Regression("revenue", transform="none", centre=0.0, scale=1.0, huber=1.0)
    model, baseline = ({f"{name}/revenue": value for name in kind.metrics} for value in (error, -1.25 * error))
    for line in ranking_table(model, baseline, [kind]).splitlines()[2:]:
        label, metric, one, other = line.split()
        assert [float(one), float(other)] == pytest.approx([error, -1.25 * error], rel=1e-3)
        assert (label, metric in kind.metrics) == ("revenue", True)
