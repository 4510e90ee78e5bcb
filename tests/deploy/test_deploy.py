"""The files of ``examples/deploy`` are valid, and say what the server does.

Programs that are not on this machine are not replaced: their checks are skipped, with the reason.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from sensorium.cli.commands.serve import models_of
from sensorium.cli.flags import build_engine_config, build_server_config
from sensorium.cli.main import build_parser
from sensorium.config import MIB, ServedConfig, ServerConfig, check_models
from sensorium.server.app import FORM_BYTES, UPLOADS
from tests.server.harness import App

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "deploy"
SHUTDOWN = ServerConfig().shutdown_timeout


def program(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if found is None:
        pytest.skip(f"{name} is not installed here")
    return found


def run(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def unit() -> dict[str, list[str]]:
    """Return the settings of the systemd unit, by name."""
    found: dict[str, list[str]] = {}
    for line in (FOLDER / "sensorium.service").read_text().splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def objects() -> list[dict[str, Any]]:
    """Return the objects for Kubernetes."""
    return list(yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text()))


def documents() -> dict[str, dict[str, Any]]:
    """Return the first object for Kubernetes of each kind."""
    return {document["kind"]: document for document in reversed(objects())}


def ingresses() -> list[dict[str, Any]]:
    """Return the objects that publish the server."""
    return [document for document in objects() if document["kind"] == "Ingress"]


def is_published(path: str) -> bool:
    """Return true if an Ingress sends requests of this path to the server."""
    rules = [rule for ingress in ingresses() for rule in ingress["spec"]["rules"]]
    published = [one for rule in rules for one in rule["http"]["paths"]]
    return any(
        path == one["path"]
        or (one["pathType"] == "Prefix" and path.startswith(one["path"].rstrip("/") + "/"))
        for one in published
    )


def container() -> dict[str, Any]:
    found: dict[str, Any]
    [found] = documents()["Deployment"]["spec"]["template"]["spec"]["containers"]
    return found


def options_of(arguments: Sequence[str]) -> ServerConfig:
    """Return the configuration of a server with these arguments of ``serve``."""
    parsed = build_parser().parse_args(["serve", *arguments])
    build_engine_config(parsed)
    return build_server_config(parsed)


def test_the_file_of_flags() -> None:
    config = options_of(["--config", str(FOLDER / "serve.yaml")])
    assert config.host == "127.0.0.1"
    assert config.served_model_name == ("assistant",)


def test_several_models_of_one_server() -> None:
    arguments = build_parser().parse_args(["serve", "--config", str(FOLDER / "models.yaml")])
    models = [
        ServedConfig(engine=build_engine_config(model), server=build_server_config(model))
        for model in models_of(arguments)
    ]
    check_models(models)
    assert [model.names[0] for model in models] == ["assistant", "embeddings", "listener"]
    assert [model.server.on_demand for model in models] == [False, False, True]


def test_the_unit() -> None:
    settings = unit()
    assert int(settings["TimeoutStopSec"][0]) > SHUTDOWN
    words = settings["ExecStart"][0].split()
    assert words[1:] == ["serve", "--config", "/etc/sensorium/serve.yaml"]
    assert "MemoryDenyWriteExecute" not in settings, "kernels are compiled"
    folders = {line.partition("=")[2] for line in settings["Environment"]}
    assert all(folder.startswith(("/var/lib/", "/var/cache/")) for folder in folders)


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    analyze = program("systemd-analyze")
    text = (FOLDER / "sensorium.service").read_text()
    text = text.replace("/opt/sensorium/.venv/bin/sensorium", sys.executable)
    (tmp_path / "sensorium.service").write_text(text)
    done = run([analyze, "verify", "--man=no", str(tmp_path / "sensorium.service")])
    assert "sensorium.service" not in done.stderr, "neither errors nor unknown settings"


def test_compose_fits_its_schema() -> None:
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    run([*check, str(FOLDER / "compose.yaml")])


def test_the_services_of_compose() -> None:
    services = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    ours = services["sensorium"]
    assert int(ours["stop_grace_period"].removesuffix("s")) > SHUTDOWN
    assert (FOLDER / ours["build"] / "Dockerfile").is_file()
    for volume in (*ours["volumes"], *services["caddy"]["volumes"]):
        source = volume.partition(":")[0]
        assert not source.startswith(".") or (FOLDER / source).is_file()
    config = options_of(["--config", str(FOLDER / "serve.yaml"), *ours["command"][2:]])
    assert f"cache:{config.file_folder}" in ours["volumes"], "uploads lie on a disk"
    assert ours["healthcheck"]["start_period"] == "1h", "a model may have to be downloaded"


def test_kubernetes_objects_fit_their_schemas() -> None:
    import kubernetes_validate

    kinds = documents()
    assert {"ConfigMap", "PersistentVolumeClaim", "Deployment", "Service", "Ingress"} <= set(kinds)
    for document in objects():
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def test_the_schemas_refuse_what_is_wrong() -> None:
    import kubernetes_validate

    deployment = documents()["Deployment"]
    [changed] = deployment["spec"]["template"]["spec"]["containers"]
    changed["livenesProbe"] = changed.pop("livenessProbe")
    with pytest.raises(Exception, match="livenesProbe"):
        kubernetes_validate.validate(deployment, kubernetes_validate.latest_version(), strict=True)


def test_probes_ask_for_health() -> None:
    ours = container()
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert ours[name]["httpGet"] == {"path": "/health", "port": "http"}, name

    def patience(probe: str) -> float:
        return float(ours[probe]["periodSeconds"] * ours[probe]["failureThreshold"])

    assert patience("readinessProbe") <= 30
    assert patience("livenessProbe") >= 600, "a new engine has to load the model"
    assert patience("startupProbe") >= 3600


def test_the_deployment_fits_the_server() -> None:
    kinds, ours = documents(), container()
    pod = kinds["Deployment"]["spec"]["template"]
    pause = int(ours["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["spec"]["terminationGracePeriodSeconds"] > SHUTDOWN + pause
    assert kinds["Service"]["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert ours["resources"]["requests"] == ours["resources"]["limits"]
    mounted = {mount["name"] for mount in ours["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["spec"]["volumes"]}
    flags = yaml.safe_load(kinds["ConfigMap"]["data"]["serve.yaml"])
    assert flags["shutdown-timeout"] == SHUTDOWN
    assert {"name": "cache", "mountPath": flags["file-folder"]} in ours["volumeMounts"]
    options_of(ours["args"][2:])


def test_the_ingress_publishes_all_but_the_metrics() -> None:
    paths = {*App().app.openapi()["paths"], "/", "/openapi.json", "/playground/facts"}
    assert {path for path in paths if not is_published(path)} == {"/metrics"}
    assert not is_published("/metrics/")


def test_the_ingress_has_a_certificate() -> None:
    for ingress in ingresses():
        [tls] = ingress["spec"]["tls"]
        assert tls["hosts"] == [rule["host"] for rule in ingress["spec"]["rules"]]
        assert tls["secretName"] in (FOLDER / "kubernetes.yaml").read_text().partition("\napi")[0]


def test_nginx_accepts_its_file(tmp_path: Path) -> None:
    nginx = program("nginx")
    site = (FOLDER / "nginx.conf").read_text()
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    openssl = [program("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes"]
    openssl += ["-subj", "/CN=localhost", "-keyout", str(key), "-out", str(certificate)]
    run(openssl)
    site = site.replace("/etc/ssl/certs/sensorium.pem", str(certificate))
    site = site.replace("/etc/ssl/private/sensorium.key", str(key))
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    folders = "".join(f"{kind}_temp_path {tmp_path}/{kind};" for kind in kinds)
    (tmp_path / "nginx.conf").write_text(
        f"pid {tmp_path}/nginx.pid; error_log stderr; events {{}} "
        f"http {{ access_log off; {folders} {site} }}"
    )
    run([nginx, "-t", "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")])


def test_caddy_accepts_its_file() -> None:
    caddy = program("caddy")
    run([caddy, "validate", "--adapter", "caddyfile", "--config", str(FOLDER / "Caddyfile")])


def test_proxies_pass_streams_and_large_bodies() -> None:
    nginx, caddy = (FOLDER / "nginx.conf").read_text(), (FOLDER / "Caddyfile").read_text()
    assert "proxy_buffering off;" in nginx
    assert "flush_interval -1" in caddy
    size = ServerConfig().max_body_bytes // MIB
    upload = (ServerConfig().max_file_bytes + FORM_BYTES) // MIB
    assert f"    client_max_body_size {size}m;" in nginx
    assert f"location = {UPLOADS} {{\n        client_max_body_size {upload}m;" in nginx
    assert f"@files path {UPLOADS}\n\trequest_body @files {{\n\t\tmax_size {upload}MiB" in caddy
    assert f"@others not path {UPLOADS}\n\trequest_body @others {{\n\t\tmax_size {size}MiB" in caddy
    most = {}
    for ingress in ingresses():
        annotations = ingress["metadata"]["annotations"]
        for rule in ingress["spec"]["rules"]:
            for one in rule["http"]["paths"]:
                most[one["path"]] = annotations["nginx.ingress.kubernetes.io/proxy-body-size"]
    assert most.pop(UPLOADS) == f"{upload}m"
    assert set(most.values()) == {f"{size}m"}
    annotations = documents()["Ingress"]["metadata"]["annotations"]
    assert annotations["nginx.ingress.kubernetes.io/proxy-buffering"] == "off"
