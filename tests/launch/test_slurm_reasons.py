"""Reasons of Slurm for which jobs wait, of 22.05 to 25.05 with and without accounting: does waiting help?"""

import pytest

from launch.schedulers.slurm_reasons import NEVER, why_it_waits


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("Priority", "Priority"),
        ("Resources", "Resources"),
        ("Licenses", "Licenses"),
        ("MaintenancePlanned", "MaintenancePlanned"),
        ("", ""),
        ("(PartitionTimeLimit)", f"can never start because {NEVER['PartitionTimeLimit']} "),
        ("ReqNodeNotAvail,_UnavailableNodes:n[1-3,007]", "waits because nodes that it needs are down, "),
        (
            "ReqNodeNotAvail, Reserved for maintenance",
            "waits because nodes that it needs are down, drained, or reserved",
        ),
        # Seen on 22.05: a prolog that fails, and a node that has gone where a job needs all.
        ("launch_failed_requeued_held", "waits because a node could not begin it"),
        ("Nodes_required_for_job_are_DOWN,_DRAINED_or_reserved_for", "waits because nodes that it needs are down"),
        # Seen on 22.05 with slurmdbd: MaxWall, MaxTRESPerJob.
        ("QOSMaxWallDurationPerJobLimit", "can never start because it asks for more than the quality of service lets"),
        ("AssocMaxGRESPerJob", "can never start because it asks for more than the account lets one job have"),
        ("QOSMaxGRESPerNode", "can never start because it asks for more than the quality of service lets one job"),
        ("QOSMinGRES", "can never start because it asks for less than the quality of service wants of a job"),
        # GrpTRES=gres/gpu=4 and a job of 8: Slurm's word is the same when others have them.
        ("QOSGrpGRES", "waits because all that the quality of service may use at a time is in use, or less than it"),
        ("AssocGrpCpuLimit", "waits because all that the account may use at a time is in use, or less than it asks"),
        ("AssocGrpGRESRunMinutes", "waits because all that the account may use at a time is in use, or less than"),
        ("AssocGrpCPUMinutesLimit", "waits because the budget of the account is used up"),
        ("QOSMaxGRESPerUser", "waits because your other jobs have what the quality of service lets you have"),
        ("AssocMaxJobsLimit", "waits because your other jobs have what the account lets you have at a time"),
        ("MaxGRESPerAccount", "waits because your other jobs have what the quality of service lets you have"),
    ],
)
def test_what_a_reason_means(reason: str, words: str) -> None:
    told = why_it_waits(reason)
    assert told.startswith(words)
    assert told in (reason, f"{told.partition(' (')[0]} ({reason})")
