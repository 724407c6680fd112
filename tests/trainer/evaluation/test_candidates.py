"""The table that sets a model beside the baseline: what it shows, and what it says of actions that are hardly taken."""

from trainer.evaluation.candidates import comparison_table


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
