"""examples/kuberay-rayjob.yaml: fields that KubeRay knows, and a command line that ours takes."""

import re
import shlex
from typing import Any

import pytest
from conftest import REPOSITORY

from vaestream.cli.arguments import parse
from vaestream.cli.commands import compress

yaml = pytest.importorskip("yaml")

# The fields of KubeRay's ray.io/v1 that an example may use, by the type that has them.
RAY_JOB_SPEC = {
    *("entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit"),
    *("submissionMode", "rayClusterSpec", "activeDeadlineSeconds", "runtimeEnvYAML", "suspend"),
    *("submitterPodTemplate", "entrypointNumCpus", "entrypointNumGpus", "metadata", "jobId"),
}
RAY_CLUSTER_SPEC = {
    *("rayVersion", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec"),
    *("workerGroupSpecs", "authOptions", "headServiceAnnotations", "suspend"),
}
HEAD = {"rayStartParams", "template", "serviceType", "enableIngress", "headService"}
WORKERS = {
    *("groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "rayStartParams"),
    *("template", "scaleStrategy", "suspend", "idleTimeoutSeconds"),
}
AUTOSCALER = {
    *("idleTimeoutSeconds", "upscalingMode", "resources", "image", "imagePullPolicy"),
    *("env", "envFrom", "volumeMounts", "securityContext", "version"),
}


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    (document,) = yaml.safe_load_all((REPOSITORY / "examples/kuberay-rayjob.yaml").read_text())
    assert isinstance(document, dict)
    return document


def test_its_fields_are_those_of_a_ray_job(job: dict[str, Any]) -> None:
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert set(job) == {"apiVersion", "kind", "metadata", "spec"}
    spec = job["spec"]
    cluster = spec["rayClusterSpec"]
    head, groups = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert set(spec) <= RAY_JOB_SPEC and set(cluster) <= RAY_CLUSTER_SPEC
    assert set(cluster["autoscalerOptions"]) <= AUTOSCALER and set(head) <= HEAD
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
    assert spec["backoffLimit"] == 0 or spec["shutdownAfterJobFinishes"]
    for group in groups:
        assert set(group) <= WORKERS
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in [head, *groups]:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        for container in group["template"]["spec"]["containers"]:
            assert set(container["resources"]) == {"requests", "limits"}
    assert len({group["groupName"] for group in groups}) == len(groups) == 2


def test_gpus_are_there_from_the_start_and_each_has_cores_for_its_workers(
    job: dict[str, Any],
) -> None:
    groups = {
        group["groupName"]: group for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    }
    (gpu,) = groups["gpu"]["template"]["spec"]["containers"]
    limits = gpu["resources"]["limits"]
    assert groups["gpu"]["minReplicas"] >= 1
    assert int(limits["cpu"]) >= 4 * int(limits["nvidia.com/gpu"]) > 0
    (cpu,) = groups["cpu"]["template"]["spec"]["containers"]
    assert "nvidia.com/gpu" not in cpu["resources"]["limits"]


def test_its_entry_point_is_a_command_line_of_ours(job: dict[str, Any]) -> None:
    program, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert program == "vaestream"
    args = parse(arguments)
    assert args.run is compress
    assert args.destination.startswith("s3://") and args.address is None


def test_it_names_the_ray_that_a_cluster_can_have(job: dict[str, Any]) -> None:
    project = (REPOSITORY / "pyproject.toml").read_text()
    wanted = re.search(r'"ray\[data\]>=(\d+)\.(\d+),<(\d+)"', project)
    assert wanted is not None
    low, minor, high = map(int, wanted.groups())
    major, now, _ = map(int, job["spec"]["rayClusterSpec"]["rayVersion"].split("."))
    assert (low, minor) <= (major, now) < (high, 0)
