"""What `doctor` finds on a Slurm cluster."""

from collections.abc import Iterator

from launch.schedulers import slurm_queue
from launch.schedulers.slurm_queue import SlurmError
from trainer.command_line import Finding


def look_at_cluster() -> Iterator[Finding]:
    """Controller, partitions with their limits and GPUs, accounting, requeueing."""
    try:
        version = slurm_queue.run(["sinfo", "--version"]).stdout.strip()
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
    if settings.get("JobRequeue") == "0":
        yield Finding(ok=True, text="JobRequeue=0: jobs are requeued only because they ask for it, as ours do")
    if settings.get("MaxArraySize") in ("0", "1"):
        yield Finding(ok=True, text="MaxArraySize allows no job arrays: submit the runs of a sweep one by one")
    wait = settings.get("KillWait", "")
    yield Finding(ok=True, text=f"KillWait {wait}: what a cancelled job has for its last save")


def _partitions() -> Iterator[Finding]:
    sinfo = slurm_queue.run(["sinfo", "--noheader", "--format=%R|%a|%D|%A|%c|%m|%G|%l|%s"])
    if sinfo.returncode != 0 or not sinfo.stdout.strip():
        yield Finding(
            ok=False, text=f"no partition may be used: {' '.join(sinfo.stderr.split()) or 'sinfo lists none'}"
        )
    for line in sinfo.stdout.splitlines():
        name, up, nodes, used, cpus, memory, gres, limit, size = line.split("|")
        idle = used.rpartition("/")[2]
        text = f"partition {name}: {nodes} nodes ({idle} idle), {cpus} cores, {memory} MiB, "
        text += f"{'no GPUs' if gres == '(null)' else gres}, at most {limit} and {size} nodes a job"
        if up != "up":
            yield Finding(ok=False, text=f"{text}; it is {up}")
        else:
            yield Finding(ok=True, text=text)
