"""What Kubernetes accepts of a job, as strict schemas: no field besides these.

Written from the API reference of Kubernetes 1.31 (Pod, Job), JobSet v1alpha2 and Volcano's Job v1alpha1: the fields
that a training job may need, of the types that are given there.
"""

from typing import Any

Schema = dict[str, Any] | list[Any] | type | set[str]
"""A dictionary: exactly these keys, those ending in ? may be missing.  A list: each element.  A set: one of these."""

_LABELS = {"*": str}

_POD = {
    "metadata?": {"annotations?": _LABELS, "labels?": _LABELS},
    "spec": {
        "restartPolicy": {"Never", "OnFailure"},
        "terminationGracePeriodSeconds?": int,
        "serviceAccountName?": str,
        "priorityClassName?": str,
        "nodeSelector?": _LABELS,
        "imagePullSecrets?": [{"name": str}],
        "tolerations?": [
            {
                "key?": str,
                "operator?": {"Exists", "Equal"},
                "value?": str,
                "effect?": {"NoSchedule", "PreferNoSchedule", "NoExecute"},
            }
        ],
        "containers": [
            {
                "name": str,
                "image": str,
                "command?": [str],
                "env?": [{"name": str, "value": str}],
                "resources?": {"limits?": _LABELS, "requests?": _LABELS},
                "volumeMounts?": [{"name": str, "mountPath": str, "readOnly?": bool}],
                "securityContext?": {"capabilities?": {"add?": [str]}},
            }
        ],
        "volumes?": [
            {
                "name": str,
                "emptyDir?": {"medium?": {"", "Memory"}, "sizeLimit?": str},
                "hostPath?": {"path": str},
                "persistentVolumeClaim?": {"claimName": str, "readOnly?": bool},
            }
        ],
    },
}

_JOB = {
    "parallelism?": int,
    "completions?": int,
    "completionMode?": {"Indexed", "NonIndexed"},
    "backoffLimit?": int,
    "podFailurePolicy?": {
        "rules": [
            {
                "action": {"FailJob", "FailIndex", "Ignore", "Count"},
                "onPodConditions?": [{"type": str, "status": {"True", "False", "Unknown"}}],
                "onExitCodes?": {"containerName?": str, "operator": {"In", "NotIn"}, "values": [int]},
            }
        ]
    },
    "template": _POD,
}

JOBSET: Schema = {
    "apiVersion": {"jobset.x-k8s.io/v1alpha2"},
    "kind": {"JobSet"},
    "metadata": {"name": str, "namespace": str, "labels?": _LABELS},
    "spec": {
        "network?": {"enableDNSHostnames?": bool, "publishNotReadyAddresses?": bool, "subdomain?": str},
        "failurePolicy?": {
            "maxRestarts?": int,
            "rules?": [
                {
                    "name": str,
                    "action": {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"},
                    "onJobFailureReasons?": [
                        {"BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded"}
                        | {"PodFailurePolicy"}
                    ],
                }
            ],
        },
        "replicatedJobs": [{"name": str, "replicas?": int, "template": {"metadata?": _LABELS, "spec": _JOB}}],
    },
}

VOLCANO_JOB: Schema = {
    "apiVersion": {"batch.volcano.sh/v1alpha1"},
    "kind": {"Job"},
    "metadata": {"name": str, "namespace": str, "labels?": _LABELS},
    "spec": {
        "schedulerName": {"volcano"},
        "minAvailable?": int,
        "maxRetry?": int,
        "queue?": str,
        "priorityClassName?": str,
        "plugins?": {"svc?": [str], "env?": [str], "ssh?": [str]},
        "policies?": [
            {
                "event?": {"PodFailed", "PodEvicted", "Unknown", "TaskCompleted", "*"},
                "action": {"AbortJob", "RestartJob", "RestartTask", "TerminateJob", "CompleteJob"},
            }
        ],
        "tasks": [{"name": str, "replicas": int, "template": _POD}],
    },
}


def faults(value: Any, schema: Schema, place: str = "") -> list[str]:
    """Where `value` is not what the schema says."""
    if isinstance(schema, set):
        return [] if value in schema else [f"{place}: {value!r} is none of {sorted(schema)}"]
    if isinstance(schema, type):
        # True is an int to Python and not to Kubernetes.
        return [] if type(value) is schema else [f"{place}: {value!r} is no {schema.__name__}"]
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{place}: {value!r} is no list"]
        return [fault for i, entry in enumerate(value) for fault in faults(entry, schema[0], f"{place}[{i}]")]
    if not isinstance(value, dict):
        return [f"{place}: {value!r} is no object"]
    if "*" in schema:
        return [fault for key, entry in value.items() for fault in faults(entry, schema["*"], f"{place}.{key}")]
    known = {key.rstrip("?"): entry for key, entry in schema.items()}
    found = [f"{place}.{key} is unknown" for key in value if key not in known]
    found += [f"{place}.{key} is missing" for key in schema if not key.endswith("?") and key not in value]
    return found + [f for key in value if key in known for f in faults(value[key], known[key], f"{place}.{key}")]
