"""Jobs for Kubernetes: accepted by strict schemas, sent to and read from a small API server."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from docker.errors import DockerException, ImageNotFound
from torchx.specs import AppState

from launch.commands import app
from launch.schedulers.containers import docker_answers
from launch.schedulers.kubernetes import Kubernetes, KubernetesError
from launch.submit import check, connected
from tests.launch.kubernetes_schemas import JOBSET, VOLCANO_JOB, faults
from tests.launch.test_component import request
from trainer.command_line import run_command

OPTIONS = [
    "namespace=team",
    "queue=q",
    "service_account=sa",
    "priority_class=high",
    "node_selector=gpu=h100,zone=a",
    "tolerations=gpu=yes:NoSchedule,spot",
    "pull_secrets=one,two",
    "shared_memory_gib=64",
    "rdma=rdma/hca:8",
    "grace_period_s=300",
]
IN_CONTAINER: dict[str, Any] = {
    "scheduler": "kubernetes",
    "image": "img:1",
    "run_dir": Path("/runs/demo"),
    "mounts": ["runs-claim:/runs", "/data:/mnt/data:ro"],
}


def _built(kind: str, **changes: Any) -> Any:
    asked = request(**(IN_CONTAINER | changes))
    with connected("kubernetes") as connection:
        options = check(connection.scheduler, asked) | {"kind": kind}
        return connection.dry_run(asked, options).request


@pytest.mark.parametrize(("kind", "schema"), [("jobset", JOBSET), ("volcano", VOLCANO_JOB)])
@pytest.mark.parametrize("changes", [{}, {"options": OPTIONS, "max_retries": 2}, {"machine": None, "nodes": 1}])
def test_requests_are_what_the_cluster_accepts(kind: str, schema: Any, changes: dict[str, Any]) -> None:
    resource = _built(kind, **changes).resource
    assert faults(resource, schema) == []
    # As it is shown, and sent.
    assert yaml.safe_load(str(_built(kind, **changes))).keys() == resource.keys()
    assert json.loads(json.dumps(resource)) == resource


def test_the_schemas_find_what_is_wrong() -> None:
    resource = _built("jobset").resource
    resource["spec"]["replicatedJobs"][0]["template"]["spec"]["paralellism"] = 2
    resource["spec"]["failurePolicy"]["maxRestarts"] = True
    del resource["kind"]
    assert len(faults(resource, JOBSET)) == 3


def _pod(resource: dict[str, Any]) -> dict[str, Any]:
    if resource["kind"] == "JobSet":
        found: dict[str, Any] = resource["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    else:
        found = resource["spec"]["tasks"][0]["template"]["spec"]
    return found


@pytest.mark.parametrize("kind", ["jobset", "volcano"])
def test_one_template_makes_all_nodes(kind: str) -> None:
    resource = _built(kind, nodes=5, options=OPTIONS).resource
    pod = _pod(resource)
    (container,) = pod["containers"]
    command, variables = container["command"], {entry["name"]: entry["value"] for entry in container["env"]}
    number = command[command.index("--node-rank") + 1]
    first = command[command.index("--first-node-variable") + 1]
    if kind == "jobset":
        job = resource["spec"]["replicatedJobs"][0]["template"]["spec"]
        assert (job["parallelism"], job["completions"], job["completionMode"]) == (5, 5, "Indexed")
        assert number == "JOB_COMPLETION_INDEX"
        name = resource["metadata"]["name"]
        assert variables[first] == f"{name}-trainer-0-0.{name}"
        assert resource["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "q"}
    else:
        assert (resource["spec"]["tasks"][0]["replicas"], resource["spec"]["minAvailable"]) == (5, 5)
        assert (number, first) == ("VC_TASK_INDEX", "VC_TRAINER_HOSTS")
        assert resource["spec"]["queue"] == "q"
    limits = {"cpu": "184", "memory": "1843200Mi", "nvidia.com/gpu": "8", "rdma/hca": "8"}
    assert container["resources"]["limits"] == limits
    assert pod["nodeSelector"] == {"gpu": "h100", "zone": "a"}
    assert pod["terminationGracePeriodSeconds"] == 300
    assert [toleration["operator"] for toleration in pod["tolerations"]] == ["Equal", "Exists"]
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in container["volumeMounts"]}
    assert mounts == {"/dev/shm": False, "/runs": False, "/mnt/data": True}
    claims = [volume["persistentVolumeClaim"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume]
    assert claims == [{"claimName": "runs-claim"}]


def test_what_the_user_typed_is_not_expanded() -> None:
    (container,) = _pod(_built("jobset", overrides=["data.path=$(HOME) $x ${app_id}"]).resource)["containers"]
    assert container["command"][-1] == "data.path=$$(HOME) $x ${app_id}"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("kind=pod", "must be jobset or volcano"),
        ("color=red", "is unknown to kubernetes, which has: kind, namespace, queue"),
        ("grace_period_s=5m", "must be a whole number"),
        ("node_selector=gpu", "'gpu' is not KEY=VALUE"),
        ("rdma=hca", "must be NAME:COUNT"),
    ],
)
def test_malformed_options_are_refused(option: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _built("jobset", options=[option])


class Server(ThreadingHTTPServer):
    """Keeps what is created, and answers with what a test wrote."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, Any] = {}
        self.pods: list[dict[str, Any]] = []
        self.logs: dict[str, str] = {}
        self.events: list[dict[str, Any]] | None = None


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def _answer(self, code: int, body: Any) -> None:
        text = body if isinstance(body, str) else json.dumps(body)
        self.send_response(code)
        self.send_header("Content-Type", "text/plain" if isinstance(body, str) else "application/json")
        self.end_headers()
        self.wfile.write(text.encode())

    def do_POST(self) -> None:
        resource = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.objects[f"{self.path}/{resource['metadata']['name']}"] = resource
        self._answer(201, resource)

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        name = path.split("/")[-2]
        if path.endswith("/log"):
            self._answer(200, self.server.logs[name])
        elif path.endswith("/pods"):
            assert "labelSelector=" in query
            self._answer(200, {"kind": "PodList", "apiVersion": "v1", "items": self.server.pods})
        elif path.endswith("/events"):
            forbidden = {"kind": "Status", "code": 403}
            listed = {"kind": "EventList", "apiVersion": "v1", "items": self.server.events}
            self._answer(*((403, forbidden) if self.server.events is None else (200, listed)))
        elif path == "/apis/":
            groups = [{"name": "jobset.x-k8s.io", "versions": [{"groupVersion": "a", "version": "b"}]}]
            self._answer(200, {"kind": "APIGroupList", "groups": groups})
        elif path in self.server.objects:
            self._answer(200, self.server.objects[path])
        else:
            self._answer(404, {"kind": "Status", "code": 404})

    def do_DELETE(self) -> None:
        self._answer(200, self.server.objects.pop(self.path))

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    pytest.importorskip("kubernetes")
    with Server() as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "c",
            "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
            "clusters": [{"name": "k", "cluster": {"server": f"http://127.0.0.1:{running.server_port}"}}],
            "users": [{"name": "u", "user": {}}],
        }
        (tmp_path / "config").write_text(yaml.safe_dump(config))
        # The client reads the variable when it is imported.
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "config"))
        yield running
        running.shutdown()


def _sent(kind: str) -> str:
    with connected("kubernetes") as connection:
        info = connection.dry_run(request(**IN_CONTAINER), {"kind": kind})
        return str(connection.scheduler.schedule(info))


@pytest.mark.parametrize(
    ("kind", "status", "state"),
    [
        ("jobset", {}, AppState.PENDING),
        ("jobset", {"replicatedJobsStatus": [{"name": "trainer", "active": 1}]}, AppState.RUNNING),
        ("jobset", {"conditions": [{"type": "Suspended", "status": "True"}]}, AppState.PENDING),
        ("jobset", {"conditions": [{"type": "Completed", "status": "True"}]}, AppState.SUCCEEDED),
        ("jobset", {"conditions": [{"type": "Failed", "status": "True"}]}, AppState.FAILED),
        ("volcano", {"state": {"phase": "Running"}}, AppState.RUNNING),
        ("volcano", {"state": {"phase": "Aborted"}}, AppState.CANCELLED),
    ],
)
def test_a_job_is_sent_watched_and_cancelled(server: Server, kind: str, status: Any, state: AppState) -> None:
    app_id = _sent(kind)
    namespace, of_kind, name = app_id.split(":")
    assert (namespace, of_kind) == ("default", kind)
    ((path, resource),) = server.objects.items()
    assert path.endswith(f"/namespaces/default/{'jobsets' if kind == 'jobset' else 'jobs'}/{name}")
    resource["status"] = status
    scheduler = Kubernetes("test")
    found = scheduler.status(app_id, None)
    assert found is not None
    assert found.state == state
    scheduler.cancel_job(app_id, None)
    assert server.objects == {}
    assert scheduler.status(app_id, None) is None


def test_a_waiting_pod_says_why_and_a_running_one_what(server: Server) -> None:
    app_id = _sent("jobset")
    labels = {"batch.kubernetes.io/job-completion-index": "1"}
    unschedulable = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes: insufficient gpu"}
    server.pods = [
        {"metadata": {"name": "p-0"}, "spec": {"containers": []}, "status": {"conditions": [unschedulable]}},
        {"metadata": {"name": "p-1", "labels": labels}, "spec": {"containers": [], "nodeName": "n7"}, "status": {}},
    ]
    server.logs = {"p-1": "one\ntwo\n"}
    scheduler = Kubernetes("test")
    found = scheduler.status(app_id, None)
    assert found is not None
    assert (found.reason, found.nodes) == ("p-0: 0/3 nodes: insufficient gpu", "n7")
    assert list(scheduler.output(app_id, None, 1)) == ["one\n", "two\n"]
    with pytest.raises(ValueError, match="has no pod of node 2"):
        list(scheduler.output(app_id, None, 2))


def _event(of: str, second: int, words: str) -> dict[str, Any]:
    moment = f"2026-11-30T00:00:0{second}Z"
    about = {"metadata": {"name": f"e{second}"}, "involvedObject": {"name": of}, "lastTimestamp": moment}
    return {**about, "reason": "FailedCreate", "message": words}


def test_a_job_without_pods_says_what_the_cluster_warned_of(server: Server) -> None:
    app_id = _sent("jobset")
    name = app_id.rpartition(":")[2]
    scheduler = Kubernetes("test")
    for events, reason in (
        # One who may not read them.
        (None, ""),
        ([], ""),
        (
            [_event(f"{name}-trainer-0", 2, "exceeded quota: gpus"), _event(name, 1, "earlier"), _event("b", 3, "no")],
            f"{name}-trainer-0: FailedCreate exceeded quota: gpus",
        ),
    ):
        server.events = events
        found = scheduler.status(app_id, None)
        assert found is not None
        assert (found.state, found.reason) == (AppState.PENDING, reason)


def test_a_failed_job_says_how_its_first_pod_ended(server: Server) -> None:
    app_id = _sent("jobset")
    (resource,) = server.objects.values()
    resource["status"] = {"conditions": [{"type": "Failed", "status": "True", "message": "jobset failed"}]}

    def pod(name: str, reason: str, code: int, second: int) -> dict[str, Any]:
        ended = {"reason": reason, "exitCode": code, "finishedAt": f"2026-11-30T00:00:0{second}Z"}
        of_image = {"image": "i", "imageID": "", "name": "trainer", "ready": False, "restartCount": 0}
        status = {"containerStatuses": [{**of_image, "state": {"terminated": ended}}]}
        return {"metadata": {"name": name}, "spec": {"containers": []}, "status": status}

    server.pods = [pod("p-0", "Error", 5, 3), pod("p-1", "OOMKilled", 137, 2), pod("p-2", "Completed", 0, 1)]
    found = Kubernetes("test").status(app_id, None)
    assert found is not None
    assert (found.state, found.reason) == (AppState.FAILED, "jobset failed; p-1: OOMKilled, exit code 137")


def _no_docker() -> None:
    """As the client does where nothing listens; the real one leaves a socket open."""
    raise DockerException("Connection aborted.")


def test_doctor_knows_which_controllers_there_are(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("docker.from_env", _no_docker)
    found = {finding.text.split()[0]: (finding.ok, finding.text) for finding in Kubernetes("test").doctor()}
    # One of the two controllers is enough; without Docker nothing can be submitted.
    assert {name: ok for name, (ok, _) in found.items()} == {
        "jobset.x-k8s.io": True,
        "batch.volcano.sh": True,
        "Kueue": True,
        "Docker": False,
    }
    assert found["batch.volcano.sh"][1] == "batch.volcano.sh is not installed: --option kind=volcano fails"


def test_submitting_without_docker_is_one_line(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("docker.from_env", _no_docker)
    with connected("kubernetes") as connection:
        asked = request(**(IN_CONTAINER | {"options": ["image_repo=r/you"]}))
        with pytest.raises(ConnectionError, match=r"Docker does not answer \(.*\): start it on this machine"):
            connection.submit(asked, check(connection.scheduler, asked))


def test_what_docker_refuses_is_said_in_its_words() -> None:
    with pytest.raises(ConnectionError, match=r"^Docker refuses: pull access denied"), docker_answers():
        raise ImageNotFound("pull access denied for a/b")


def test_the_output_of_pods_is_followed_and_ranks_logs_are_not_here(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    app_id = _sent("jobset")
    (resource,) = server.objects.values()
    resource["status"] = {"conditions": [{"type": "Completed", "status": "True"}]}
    labels = {"batch.kubernetes.io/job-completion-index": "0"}
    server.pods = [{"metadata": {"name": "p-0", "labels": labels}, "spec": {"containers": []}, "status": {}}]
    server.logs = {"p-0": "one\nhalf a"}
    handle = f"kubernetes://longview/{app_id}"
    for arguments in ([], ["--follow"], ["--node", "0"]):
        assert run_command(app, ["logs", handle, *arguments]) == 0
        assert capsys.readouterr().out == "one\nhalf a"
    assert run_command(app, ["logs", handle, "--rank", "1"]) == 2
    assert "is not on this machine: give --node instead" in capsys.readouterr().err


def test_a_server_that_does_not_answer_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("kubernetes")
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    with pytest.raises(KubernetesError, match="kubernetes does not answer"):
        Kubernetes("test").status("default:jobset:x", None)
