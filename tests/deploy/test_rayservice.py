"""The RayService of ``examples/deploy``: valid for Ray and Kubernetes, and for this server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from sensorium.config import ServerConfig

FILE = Path(__file__).parents[2] / "examples" / "deploy" / "rayservice.yaml"


def service() -> dict[str, Any]:
    """Return the specification of the RayService."""
    for document in yaml.safe_load_all(FILE.read_text()):
        if document["kind"] == "RayService":
            found: dict[str, Any] = document["spec"]
            return found
    raise AssertionError("no RayService")


def pods() -> dict[str, dict[str, Any]]:
    """Return the templates of pods by the name of their container."""
    cluster = service()["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return {
        group["template"]["spec"]["containers"][0]["name"]: group["template"] for group in groups
    }


def options() -> dict[str, Any]:
    """Return the arguments of the application."""
    [application] = yaml.safe_load(service()["serveConfigV2"])["applications"]
    found: dict[str, Any] = application["args"]
    return found


def test_ray_serve_takes_the_configuration() -> None:
    from ray.serve.schema import ServeDeploySchema

    from sensorium.ray import build_app
    from sensorium.ray.serving import app

    config = ServeDeploySchema.model_validate(yaml.safe_load(service()["serveConfigV2"]))
    [application] = config.applications
    assert application.import_path == "sensorium.ray:build_app"
    assert config.http_options.port == 8000
    built = build_app(application.args)
    assert built._bound_deployment.name == app.SERVER


def test_pods_fit_their_schema() -> None:
    import kubernetes_validate

    version = kubernetes_validate.latest_version()
    for name, template in pods().items():
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, **template["metadata"]},
        }
        kubernetes_validate.validate({**pod, "spec": template["spec"]}, version, strict=True)
        container = template["spec"]["containers"][0]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in template["spec"]["volumes"]}
        assert container["resources"]["requests"] == container["resources"]["limits"]


def test_a_worker_has_room_for_its_replicas_and_time_to_end() -> None:
    from sensorium.ray.serving import app

    worker, given = pods()["ray-worker"]["spec"], options()
    [container] = worker["containers"]
    assert (
        int(container["resources"]["limits"]["cpu"]) == given["engine_cpus"] + given["server_cpus"]
    )
    assert given["shutdown_timeout"] == ServerConfig().shutdown_timeout
    seconds = given["shutdown_timeout"] + app.DRAIN_SPARE
    assert worker["terminationGracePeriodSeconds"] > seconds
    assert container["readinessProbe"]["httpGet"] == {"path": "/-/healthz", "port": "serve"}
    [group] = service()["rayClusterConfig"]["workerGroupSpecs"]
    least, most = given["autoscale"].split(":")
    assert (group["minReplicas"], group["maxReplicas"]) == (int(least), int(most))


def test_the_cluster_asks_for_a_token_and_the_server_for_a_key() -> None:
    cluster, head = service()["rayClusterConfig"], "".join(FILE.read_text().splitlines()[:8])
    assert cluster["authOptions"]["mode"] == "token"
    for template in pods().values():
        [secret] = template["spec"]["containers"][0]["envFrom"]
        assert f"generic {secret['secretRef']['name']} " in head
    assert f"generic {cluster['authOptions']['secretName']} " in head
