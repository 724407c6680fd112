"""A job as Kubernetes is told of it: one pod template with N completions, as a JobSet or as a Volcano job."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchx.specs import AppDef, BindMount, Role, VolumeMount, macros

from trainer.exit_status import STOPPED

OPTIONS = {
    "kind": "jobset (the default) or volcano: which controller of the cluster runs the job",
    "namespace": "the namespace; default: default",
    "queue": "Kueue's local queue (jobset), or Volcano's queue",
    "service_account": "the pods' service account",
    "priority_class": "the pods' priority class",
    "node_selector": "KEY=VALUE[,KEY=VALUE ...] that nodes must carry",
    "tolerations": "KEY[=VALUE][:EFFECT][,...] that are tolerated",
    "pull_secrets": "NAME[,NAME ...] for the image",
    "shared_memory_gib": "size of /dev/shm; default: as much as the pod's memory",
    "rdma": "NAME:COUNT, the resource of the RDMA devices, as rdma/hca:8",
    "grace_period_s": "seconds that a pod has for its last save; default: 120",
    "image_repo": "where the image with the code is pushed",
}
"""Options of the scheduler and what they are."""

CONTAINER = "trainer"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """The options of a request, parsed."""

    kind: str = "jobset"
    namespace: str = "default"
    queue: str = ""
    service_account: str = ""
    priority_class: str = ""
    node_selector: str = ""
    tolerations: str = ""
    pull_secrets: str = ""
    shared_memory_gib: str = ""
    rdma: str = ""
    grace_period_s: str = "120"
    image_repo: str = ""

    def __post_init__(self) -> None:
        if self.kind not in ("jobset", "volcano"):
            raise ValueError(f"--option kind={self.kind}: must be jobset or volcano")
        for name in ("shared_memory_gib", "grace_period_s"):
            value = getattr(self, name)
            if value and not value.isdigit():
                raise ValueError(f"--option {name}={value}: must be a whole number")
        for pair in _listed(self.node_selector):
            if "=" not in pair:
                raise ValueError(f"--option node_selector={self.node_selector}: {pair!r} is not KEY=VALUE")
        name, colon, count = self.rdma.rpartition(":")
        if self.rdma and not (colon and name and count.isdigit()):
            raise ValueError(f"--option rdma={self.rdma}: must be NAME:COUNT, as rdma/hca:8")


def manifest(app: AppDef, name: str, cluster: Cluster) -> dict[str, Any]:
    """The object to create, called `name`."""
    (role,) = app.roles
    return _jobset(role, name, cluster) if cluster.kind == "jobset" else _volcano_job(role, name, cluster)


def _jobset(role: Role, name: str, cluster: Cluster) -> dict[str, Any]:
    # JobSet gives every pod a host name, JOBSET-REPLICATED_JOB-0-INDEX, in a subdomain of the JobSet's name.
    pod = _pod(role, cluster, node_rank="JOB_COMPLETION_INDEX", first_node=f"{name}-{CONTAINER}-0-0.{name}")
    job = {
        "parallelism": role.num_replicas,
        "completions": role.num_replicas,
        "completionMode": "Indexed",
        # One pod's failure is the job's: all start again together, or none.
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [STOPPED]},
                },
            ]
        },
        "template": pod,
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": name,
            "namespace": cluster.namespace,
            "labels": {"kueue.x-k8s.io/queue-name": cluster.queue} if cluster.queue else {},
        },
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": role.max_retries,
                # An eviction, a preemption and a stop in good order cost no retry.
                "rules": [
                    {
                        "name": "taken",
                        "action": "RestartJobSetAndIgnoreMaxRestarts",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [{"name": CONTAINER, "replicas": 1, "template": {"spec": job}}],
        },
    }


def _volcano_job(role: Role, name: str, cluster: Cluster) -> dict[str, Any]:
    # Volcano's plugins give every pod VC_TASK_INDEX and the list of a task's host names.
    pod = _pod(role, cluster, node_rank="VC_TASK_INDEX", first_node="")
    spec: dict[str, Any] = {
        "schedulerName": "volcano",
        "minAvailable": role.num_replicas,
        "maxRetry": role.max_retries,
        "plugins": {"svc": ["--publish-not-ready-addresses"], "env": []},
        "policies": [
            {"event": "PodEvicted", "action": "RestartJob"},
            {"event": "PodFailed", "action": "RestartJob" if role.max_retries else "AbortJob"},
        ],
        "tasks": [{"name": CONTAINER, "replicas": role.num_replicas, "template": pod}],
    }
    if cluster.queue:
        spec["queue"] = cluster.queue
    if cluster.priority_class:
        spec["priorityClassName"] = cluster.priority_class
    return {
        "apiVersion": "batch.volcano.sh/v1alpha1",
        "kind": "Job",
        "metadata": {"name": name, "namespace": cluster.namespace},
        "spec": spec,
    }


def _pod(role: Role, cluster: Cluster, *, node_rank: str, first_node: str) -> dict[str, Any]:
    """The template of all pods; `first_node` is its name, or empty where Volcano tells it."""
    variable = "TORCHX_RANK0_HOST" if first_node else f"VC_{CONTAINER.upper()}_HOSTS"
    node = macros.Values(img_root="", app_id="", replica_id=node_rank, rank0_env=variable).apply(role)
    environment = dict(node.env) | ({variable: first_node} if first_node else {})
    volumes, mounts = _volumes(role, cluster)
    resources = _resources(role, cluster)
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": node.image,
        "command": [node.entrypoint, *(_as_typed(argument) for argument in node.args)],
        "env": [{"name": key, "value": _as_typed(value)} for key, value in sorted(environment.items())],
        "resources": {"limits": resources, "requests": resources},
        "volumeMounts": mounts,
    }
    if cluster.rdma:
        container["securityContext"] = {"capabilities": {"add": ["IPC_LOCK"]}}
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": int(cluster.grace_period_s),
        "containers": [container],
        "volumes": volumes,
    }
    selector = dict(pair.split("=", 1) for pair in _listed(cluster.node_selector))
    optional = {
        "serviceAccountName": cluster.service_account,
        "priorityClassName": cluster.priority_class,
        "nodeSelector": selector,
        "tolerations": [_toleration(text) for text in _listed(cluster.tolerations)],
        "imagePullSecrets": [{"name": secret} for secret in _listed(cluster.pull_secrets)],
    }
    spec |= {key: value for key, value in optional.items() if value}
    # A service mesh's sidecar would keep a pod alive after its end.
    return {"metadata": {"annotations": {"sidecar.istio.io/inject": "false"}}, "spec": spec}


def _as_typed(text: str) -> str:
    """Kubernetes expands $(NAME) in commands and values; a doubled dollar is itself."""
    return text.replace("$(", "$$(")


def _resources(role: Role, cluster: Cluster) -> dict[str, str]:
    wanted = {"cpu": str(role.resource.cpu)}
    if role.resource.memMB > 0:
        wanted["memory"] = f"{role.resource.memMB}Mi"
    if role.resource.gpu > 0:
        wanted["nvidia.com/gpu"] = str(role.resource.gpu)
    if cluster.rdma:
        name, _, count = cluster.rdma.rpartition(":")
        wanted[name] = count
    return wanted


def _volumes(role: Role, cluster: Cluster) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    # Processes of a pod talk through /dev/shm, of which a container has 64 MiB by default.
    memory: dict[str, Any] = {"medium": "Memory"}
    if cluster.shared_memory_gib:
        memory["sizeLimit"] = f"{cluster.shared_memory_gib}Gi"
    volumes: list[dict[str, Any]] = [{"name": "shared-memory", "emptyDir": memory}]
    mounts: list[dict[str, Any]] = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    for number, mount in enumerate(role.mounts):
        name = f"mount-{number}"
        if isinstance(mount, VolumeMount):
            volumes.append({"name": name, "persistentVolumeClaim": {"claimName": mount.src}})
        else:
            assert isinstance(mount, BindMount), "the component makes no other"
            volumes.append({"name": name, "hostPath": {"path": mount.src_path}})
        mounts.append({"name": name, "mountPath": mount.dst_path, "readOnly": mount.read_only})
    return volumes, mounts


def _toleration(text: str) -> dict[str, str]:
    rest, _, effect = text.partition(":")
    key, equals, value = rest.partition("=")
    toleration = {"key": key, "operator": "Equal" if equals else "Exists"}
    toleration |= {"value": value} if equals else {}
    return toleration | ({"effect": effect} if effect else {})


def _listed(text: str) -> list[str]:
    return [entry for entry in text.replace(";", ",").split(",") if entry]


def cluster_of(options: Mapping[str, Any]) -> Cluster:
    """The options, checked.

    Raises:
        ValueError: a value is not of its form.
    """
    return Cluster(**{key: str(value) for key, value in options.items() if key in OPTIONS and value is not None})
