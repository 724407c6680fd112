"""What `doctor` finds on a Slurm cluster."""

import getpass
from collections.abc import Iterator

from launch.schedulers import slurm_queue
from launch.schedulers.slurm_queue import SlurmError
from trainer.command_line import Finding


def look_at_cluster() -> Iterator[Finding]:
    """Controller, partitions with their limits and GPUs, accounting and your accounts, requeueing."""
    try:
        version = slurm_queue.run(["sinfo", "--version"]).stdout.strip().rpartition("\n")[2]
        config = slurm_queue.run(["scontrol", "show", "config"])
    except SlurmError as error:
        yield Finding(ok=False, text=str(error))
        return
    if config.returncode != 0:
        yield Finding(ok=False, text=f"the controller does not answer: {' '.join(config.stderr.split())}")
        return
    settings = {key.strip(): value.strip() for key, _, value in (x.partition("=") for x in config.stdout.splitlines())}
    yield Finding(ok=True, text=f"{version}, cluster {settings.get('ClusterName', 'without a name')}")
    yield from _partitions()
    accounting = settings.get("AccountingStorageType", "") not in ("", "(null)", "accounting_storage/none")
    told = "is remembered" if accounting else "is forgotten minutes after its end, then read from its own output"
    yield Finding(ok=True, text=f"accounting {'on' if accounting else 'off'}: a job's state {told}")
    if accounting:
        yield from _accounts(enforced="associations" in settings.get("AccountingStorageEnforce", ""))
    if settings.get("JobRequeue") == "0":
        yield Finding(ok=True, text="JobRequeue=0: jobs are requeued only because they ask for it, as ours do")
    if settings.get("MaxArraySize") in ("0", "1"):
        yield Finding(ok=True, text="MaxArraySize allows no job arrays: submit the runs of a sweep one by one")
    wait = settings.get("KillWait", "")
    yield Finding(ok=True, text=f"KillWait {wait}: what a cancelled job has for its last save")


def _accounts(*, enforced: bool) -> Iterator[Finding]:
    """What --option account=... and qos=... may name."""
    user = getpass.getuser()
    show = ["sacctmgr", "--noheader", "--parsable2", "show", "associations", "where", f"user={user}"]
    try:
        told = slurm_queue.run([*show, "format=account,partition,qos,defaultqos"])
    except SlurmError as error:
        yield Finding(ok=True, text=f"your accounts are not known: {error}")
        return
    if told.returncode != 0:
        yield Finding(ok=True, text=f"your accounts are not known: {' '.join(told.stderr.split())}")
        return
    rows = _rows(told.stdout, columns=4)
    if not rows and enforced:
        yield Finding(
            ok=False, text=f"accounting knows no account of {user}, and takes no job without one: ask for one"
        )
    for row in rows:
        account, partition, qualities, default = (word.strip() for word in row)
        where = f" in partition {partition}" if partition else ""
        usual = f", {default} unless you say another" if default else ""
        yield Finding(
            ok=True, text=f"account {account}{where}: qualities of service {qualities or 'of the site'}{usual}"
        )


def _partitions() -> Iterator[Finding]:
    sinfo = slurm_queue.run(["sinfo", "--noheader", "--format=%R|%a|%D|%A|%c|%m|%G|%l|%s"])
    if sinfo.returncode != 0 or not sinfo.stdout.strip():
        yield Finding(
            ok=False, text=f"no partition may be used: {' '.join(sinfo.stderr.split()) or 'sinfo lists none'}"
        )
    for name, up, nodes, used, cpus, memory, gres, limit, size in _rows(sinfo.stdout, columns=9):
        idle = used.rpartition("/")[2]
        text = f"partition {name}: {nodes} nodes ({idle} idle), {cpus} cores, {memory} MiB, "
        text += f"{'no GPUs' if gres == '(null)' else gres}, at most {limit} and {size} nodes a job"
        if up != "up":
            yield Finding(ok=False, text=f"{text}; it is {up}")
        else:
            yield Finding(ok=True, text=text)


def _rows(output: str, *, columns: int) -> list[list[str]]:
    """The lines that are rows of a table; a site's wrapper may greet before them."""
    return [row for line in output.splitlines() if len(row := line.split("|")) == columns]
