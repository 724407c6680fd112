"""What doctor says of a Slurm cluster with accounting, whose commands are stand-ins: of whose accounts jobs may be."""

from collections.abc import Callable

import pytest

from launch.schedulers.slurm_doctor import look_at_cluster

CONFIG = """\
ClusterName             = west
AccountingStorageType   = accounting_storage/slurmdbd
AccountingStorageEnforce = {}
"""
GREETING = "*** Welcome to west: maintenance=Tuesday NodeAddr=help@site ***"
SINFO = f"echo '{GREETING}'; "
SINFO += "case $* in *format*) echo 'gpu|up|2|0/2/0/2|192|2000|gpu:8|1:00:00|1-2' ;; *) echo slurm 25.05.1 ;; esac"
LISTED = """\
abc||high,normal|normal
abc|gpu||
"""


@pytest.mark.parametrize(
    ("listed", "enforced", "findings"),
    [
        (
            f"printf '%s' '{LISTED}'",
            "associations,limits",
            [
                (True, "account abc: qualities of service high,normal, normal unless you say another"),
                (True, "account abc in partition gpu: qualities of service of the site"),
            ],
        ),
        ("true", "associations,limits", [(False, "accounting knows no account of me, and takes no job without one: ")]),
        ("true", "none", []),
        ("echo no such user >&2; exit 1", "none", [(True, "your accounts are not known: no such user")]),
    ],
)
def test_accounts_and_qualities_are_listed(
    monkeypatch: pytest.MonkeyPatch,
    commands: Callable[..., None],
    listed: str,
    enforced: str,
    findings: list[tuple[bool, str]],
) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "me")
    commands(scontrol=f"echo '{CONFIG.format(enforced)}'", sinfo=SINFO, sacctmgr=f"echo '{GREETING}'; {listed}")
    all_findings = list(look_at_cluster())
    assert all_findings[0].text == "slurm 25.05.1, cluster west"
    assert all_findings[1].text.startswith("partition gpu: 2 nodes (2 idle), 192 cores")
    said = [(finding.ok, finding.text) for finding in all_findings if "account" in finding.text]
    assert said[0] == (True, "accounting on: a job's state is remembered")
    assert [(ok, text[: len(words)]) for (ok, text), (_, words) in zip(said[1:], findings, strict=True)] == findings
