"""Why a job of Slurm waits, in words that say whether waiting helps.

Limits are those of an association (a user in an account) or of a quality of service; their names are made of whose
they are, and of what they hold for: `QOSMaxGRESPerUser`, `AssocGrpCpuLimit`.
"""

import re

NEVER = {
    "BadConstraints": "no node satisfies the constraints",
    "DependencyNeverSatisfied": "the job that it waits for has ended otherwise",
    "InvalidAccount": "the account is not valid: --option account=NAME",
    "InvalidQOS": "the quality of service is not valid: --option qos=NAME",
    "PartitionConfig": "no node of the partition has the cores, memory or GPUs that it asks for",
    "PartitionNodeLimit": "it asks for more nodes than the partition lets a job have",
    "PartitionTimeLimit": "it asks for more time than the partition allows: --option time=...",
    "QOSNotAllowed": "the quality of service may not be used there: --option qos=NAME",
    "ReservationDeleted": "its reservation is gone: --option reservation=NAME",
}
"""Reasons for which a waiting job does not start by waiting, and what they mean."""

LATER = {
    "JobHeldAdmin": "an administrator holds it",
    "JobHeldUser": "it is held: scontrol release it",
    "JobHoldMaxRequeue": "it could not be started too often: scontrol release it once the nodes are mended",
    "job_requeued_in_held_state": "it was requeued and held: scontrol release it",
    "launch_failed_requeued_held": "a node could not begin it, as where a prolog fails: scontrol release it",
    "Nodes_required_for_job_are_DOWN": "nodes that it needs are down, drained or kept for others",
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition is inactive",
    "ReqNodeNotAvail": "nodes that it needs are down, drained, or reserved before its time limit ends",
}
"""Reasons that end when somebody releases the job, or an administrator or a maintenance is done, and what they mean."""

_WHOSE = {"Assoc": "the account", "QOS": "the quality of service", "": "the quality of service"}
_LIMIT = re.compile(r"(Assoc|QOS|)(Max|Min|Grp)(\w+)")


def why_it_waits(reason: str) -> str:
    """Slurm's word for why a job waits with what it means; the word alone where that says enough.

    A list of nodes may follow the word: "ReqNodeNotAvail, UnavailableNodes:n[1-2]".
    """
    word = reason.partition(",")[0].strip("()")
    if word in NEVER:
        return f"can never start because {NEVER[word]} ({reason})"
    if word in LATER:
        return f"waits because {LATER[word]} ({reason})"
    limit = _LIMIT.fullmatch(word)
    if limit is None:
        return reason
    whose, kind, of = _WHOSE[limit[1]], limit[2], limit[3]
    if kind == "Min":
        return f"can never start because it asks for less than {whose} wants of a job ({reason})"
    if kind == "Max" and ("PerJob" in of or "PerNode" in of):
        return f"can never start because it asks for more than {whose} lets one job have ({reason})"
    if kind == "Grp" and "Minutes" in of and "Run" not in of:
        return f"waits because the budget of {whose} is used up ({reason})"
    if kind == "Grp":
        return f"waits because all that {whose} may use at a time is in use, or less than it asks for ({reason})"
    return f"waits because your other jobs have what {whose} lets you have at a time ({reason})"
