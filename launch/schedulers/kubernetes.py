"""Kubernetes: one object a job, a JobSet (which Kueue may queue) or a Volcano job."""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, ClassVar

import yaml
from torchx.schedulers.api import AppDryRunInfo, DescribeAppResponse, ListAppResponse, Scheduler
from torchx.schedulers.ids import make_unique
from torchx.specs import AppDef, AppState, CfgVal

from launch import records
from launch.records import JobRecord
from launch.request import Request
from launch.schedulers.containers import CodeInImage, check_container, docker_answers
from launch.schedulers.kubernetes_manifest import CONTAINER, OPTIONS, cluster_of, manifest
from launch.schedulers.protocol import JobStatus, ListedJob, options_from
from trainer.command_line import Finding

APIS = {
    "jobset": ("jobset.x-k8s.io", "v1alpha2", "jobsets"),
    "volcano": ("batch.volcano.sh", "v1alpha1", "jobs"),
}
"""Group, version and plural of what a job is."""

PHASES = {
    "Pending": AppState.PENDING,
    "Inqueue": AppState.PENDING,
    "Restarting": AppState.PENDING,
    "Running": AppState.RUNNING,
    "Completing": AppState.RUNNING,
    "Completed": AppState.SUCCEEDED,
    "Aborting": AppState.CANCELLED,
    "Aborted": AppState.CANCELLED,
    "Terminating": AppState.CANCELLED,
    "Terminated": AppState.CANCELLED,
    "Failed": AppState.FAILED,
}
"""Volcano's phases of a job in TorchX's terms."""


class KubernetesError(ConnectionError):
    """The API server says no, or does not answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KubernetesRequest:
    """One object for the cluster to create."""

    kind: str
    """Which kind of object: a key of APIS."""
    resource: dict[str, Any]
    """The object as it is sent."""
    images: dict[str, tuple[str, str]]
    """Images to push first, as TorchX's workspace names them."""

    def __str__(self) -> str:
        return str(yaml.safe_dump(self.resource, sort_keys=False))


class Kubernetes(CodeInImage, Scheduler[dict[str, CfgVal]]):
    """Kubernetes with JobSet or Volcano."""

    needs_image: ClassVar[bool] = True
    has_arrays: ClassVar[bool] = False
    without_effect: ClassVar[tuple[str, ...]] = ()

    def __init__(self, session_name: str) -> None:
        super().__init__("kubernetes", session_name)

    def check(self, request: Request) -> dict[str, CfgVal]:
        """The request's options, which OPTIONS lists; an image and a run directory that outlives the pods must be
        given."""
        options = options_from(request, parse=_option)
        cluster_of(options)
        check_container(request)
        return options

    def _submit_dryrun(self, app: AppDef, cfg: dict[str, CfgVal]) -> AppDryRunInfo[KubernetesRequest]:
        cluster = cluster_of(cfg)
        images = self.dryrun_push_images(app, cfg)
        resource = manifest(app, make_unique(app.name), cluster)
        return AppDryRunInfo(KubernetesRequest(kind=cluster.kind, resource=resource, images=images), str)

    def schedule(self, dryrun_info: AppDryRunInfo[KubernetesRequest]) -> str:
        """Push the image, create the object; returns NAMESPACE:KIND:NAME.

        Raises:
            KubernetesError: the API server refuses it or does not answer.
        """
        request = dryrun_info.request
        self.push_images(request.images)
        namespace = request.resource["metadata"]["namespace"]
        group, version, plural = APIS[request.kind]
        with _api() as client:
            created = client.CustomObjectsApi().create_namespaced_custom_object(
                group, version, namespace, plural, request.resource
            )
        return f"{namespace}:{request.kind}:{created['metadata']['name']}"

    def record_of(self, app_id: str) -> JobRecord | None:
        """None: nothing leads from an object of the cluster to the record of another checkout."""
        return None

    def status(self, app_id: str, record: JobRecord | None) -> JobStatus | None:
        """From the object's conditions, and where its pods are."""
        namespace, kind, name = _parts(app_id)
        group, version, plural = APIS[kind]
        with _api() as client:
            try:
                job = client.CustomObjectsApi().get_namespaced_custom_object(group, version, namespace, plural, name)
            except client.ApiException as error:
                if error.status == HTTPStatus.NOT_FOUND:
                    return None
                raise
            pods = client.CoreV1Api().list_namespaced_pod(namespace, label_selector=_label(kind, name)).items
            state, reason = _jobset_state(job) if kind == "jobset" else _volcano_state(job)
            if state == AppState.FAILED:
                told = _first_end(pods)
            else:
                told = next((why for pod in pods for why in _why_waiting(pod)), "")
            if state == AppState.PENDING and not told:
                told = _newest_warning(client, namespace, name)
        nodes = sorted({pod.spec.node_name for pod in pods if pod.spec.node_name})
        return JobStatus(state=state, reason="; ".join(filter(None, [reason, told])), nodes=" ".join(nodes))

    def output(self, app_id: str, record: JobRecord | None, node: int) -> Iterator[str]:
        """The log of the node's pod."""
        namespace, kind, name = _parts(app_id)
        with _api() as client:
            core = client.CoreV1Api()
            pods = core.list_namespaced_pod(namespace, label_selector=_label(kind, name)).items
            pod = next((pod for pod in pods if _index(pod) == str(node)), None)
            if pod is None:
                raise ValueError(f"{app_id} has no pod of node {node}: it has not started, or has fewer nodes")
            text = core.read_namespaced_pod_log(pod.metadata.name, namespace, container=CONTAINER)
        yield from text.splitlines(keepends=True)

    def cancel_job(self, app_id: str, record: JobRecord | None) -> None:
        """Delete the object; its pods have their grace period."""
        namespace, kind, name = _parts(app_id)
        group, version, plural = APIS[kind]
        with _api() as client:
            client.CustomObjectsApi().delete_namespaced_custom_object(group, version, namespace, plural, name)

    def jobs(self) -> Sequence[ListedJob]:
        """The jobs submitted from this checkout that the cluster still has."""
        found = []
        for record in records.load():
            if record.handle.startswith("kubernetes://"):
                app_id = record.handle.rpartition("/")[2]
                known = self.status(app_id, record)
                if known is not None:
                    found.append(ListedJob(app_id=app_id, state=known.state, record=record))
        return found

    def doctor(self) -> Iterator[Finding]:
        """Which of the two controllers the cluster has, and Docker, which adds the code to the image."""
        try:
            with _api() as client:
                groups = {group.name for group in client.ApisApi().get_api_versions().groups}
        except KubernetesError as error:
            yield Finding(ok=False, text=str(error))
            return
        one = any(group in groups for group, _, _ in APIS.values())
        for kind, (group, _, _) in APIS.items():
            has = group in groups
            words = "there" if has else f"not installed: --option kind={kind} fails"
            # One of the two kinds of jobs is enough.
            yield Finding(ok=one, text=f"{group} is {words}")
        has = "kueue.x-k8s.io" in groups
        yield Finding(ok=True, text=f"Kueue is {'there: --option queue=NAME' if has else 'not installed: no queue'}")
        try:
            with docker_answers():
                self._docker_client.ping()
        except ConnectionError as error:
            yield Finding(ok=False, text=f"{error}: submitting adds the code to the image with it")
        else:
            yield Finding(ok=True, text="Docker answers here, which adds the code to the image")

    def describe(self, app_id: str) -> DescribeAppResponse | None:
        """TorchX's: the state alone."""
        found = self.status(app_id, None)
        return None if found is None else DescribeAppResponse(app_id=app_id, state=found.state, msg=found.reason)

    def list(self) -> list[ListAppResponse]:
        """Asked by TorchX; our own listing is `jobs`."""
        return [ListAppResponse(app_id=job.app_id, state=job.state) for job in self.jobs()]

    def _cancel_existing(self, app_id: str) -> None:
        self.cancel_job(app_id, None)


@contextmanager
def _api() -> Iterator[Any]:
    """The client's module, configured as kubectl is; its errors in a line."""
    if importlib.util.find_spec("kubernetes") is None:
        raise KubernetesError("scheduler kubernetes needs its client: pip install kubernetes==25.3.0")
    # An optional package: imported only where it is used.
    from kubernetes import client, config
    from urllib3.exceptions import HTTPError

    try:
        config.load_kube_config()
        yield client
    except client.ApiException as error:
        raise KubernetesError(f"kubernetes refuses: {error.status} {error.reason} {error.body or ''}".strip()) from None
    except (config.ConfigException, HTTPError, OSError) as error:
        raise KubernetesError(f"kubernetes does not answer: {' '.join(str(error).split())}") from None


def _option(key: str, value: str) -> dict[str, CfgVal]:
    if key not in OPTIONS:
        raise ValueError(f"--option {key}={value} is unknown to kubernetes, which has: {', '.join(OPTIONS)}")
    return {key: value}


def _parts(app_id: str) -> tuple[str, str, str]:
    namespace, _, rest = app_id.partition(":")
    kind, _, name = rest.partition(":")
    if kind not in APIS or not name:
        raise ValueError(f"{app_id!r} is no job of kubernetes: expected NAMESPACE:KIND:NAME as `submit` prints it")
    return namespace, kind, name


def _label(kind: str, name: str) -> str:
    return f"jobset.sigs.k8s.io/jobset-name={name}" if kind == "jobset" else f"volcano.sh/job-name={name}"


def _index(pod: Any) -> str:
    """Which node of the job the pod is."""
    annotations = pod.metadata.annotations or {}
    labels = pod.metadata.labels or {}
    index = "batch.kubernetes.io/job-completion-index"
    return annotations.get(index) or labels.get(index) or labels.get("volcano.sh/task-index") or ""


def _jobset_state(job: dict[str, Any]) -> tuple[AppState, str]:
    status = job.get("status", {})
    conditions = {c["type"]: c for c in status.get("conditions", []) if c.get("status") == "True"}
    for word, state in (
        ("Completed", AppState.SUCCEEDED),
        ("Failed", AppState.FAILED),
        ("Suspended", AppState.PENDING),
    ):
        if word in conditions:
            return state, "" if word == "Completed" else conditions[word].get("message", "")
    active = any(entry.get("active") or entry.get("ready") for entry in status.get("replicatedJobsStatus", []))
    return (AppState.RUNNING if active else AppState.PENDING), ""


def _volcano_state(job: dict[str, Any]) -> tuple[AppState, str]:
    state = job.get("status", {}).get("state", {})
    return PHASES.get(state.get("phase", ""), AppState.PENDING), state.get("message", "")


def _first_end(pods: Sequence[Any]) -> str:
    """How the first container that failed has ended, where memory may have run out (OOMKilled)."""
    ends = [
        (str(ended.finished_at), f"{pod.metadata.name}: {ended.reason}, exit code {ended.exit_code}")
        for pod in pods
        for container in pod.status.container_statuses or []
        if (ended := container.state and container.state.terminated) and ended.exit_code
    ]
    return min(ends)[1] if ends else ""


def _newest_warning(client: Any, namespace: str, name: str) -> str:
    """What the cluster last warned of about the job or what is made of it: a quota, a queue, a volume."""
    try:
        events = client.CoreV1Api().list_namespaced_event(namespace, field_selector="type=Warning", limit=500).items
    except client.ApiException as error:
        if error.status == HTTPStatus.FORBIDDEN:
            return ""
        raise
    ours = [event for event in events if name in event.involved_object.name]
    newest = max(ours, key=lambda event: event.last_timestamp or event.metadata.creation_timestamp, default=None)
    return "" if newest is None else f"{newest.involved_object.name}: {newest.reason} {newest.message}"


def _why_waiting(pod: Any) -> Iterator[str]:
    """What keeps a pod from running, in the scheduler's or the node's words."""
    for condition in pod.status.conditions or []:
        if condition.type == "PodScheduled" and condition.status == "False":
            yield f"{pod.metadata.name}: {condition.message}"
    for container in pod.status.container_statuses or []:
        waiting = container.state and container.state.waiting
        if waiting and waiting.reason != "ContainerCreating":
            yield f"{pod.metadata.name}: {waiting.reason} {waiting.message or ''}".rstrip()
