"""The files to copy for clusters: valid where a schema is at hand, and in step with the program and with each other."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from typer.main import get_command

from optimizer.cli.main import app
from optimizer.exports.formats import vllm
from optimizer.job.loading import ENVIRONMENT

PROJECT = Path(__file__).resolve().parents[2]
FILES = PROJECT / "configs" / "cluster"
IMAGE = f"skipplan:{tomllib.loads((PROJECT / 'pyproject.toml').read_text())['project']['version']}"

# Fields of KubeRay 1.6 (https://docs.ray.io/en/master/cluster/kubernetes/references/api.html) that the files may use.
CLUSTER_FIELDS = {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs", "enableInTreeAutoscaling"}
HEAD_FIELDS = {"rayStartParams", "template", "serviceType"}
WORKER_FIELDS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
JOB_FIELDS = {
    "entrypoint",
    "shutdownAfterJobFinishes",
    "ttlSecondsAfterFinished",
    "submissionMode",
    "runtimeEnvYAML",
    "rayClusterSpec",
}


def load(name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((FILES / name).read_text())
    return document


def check_command(words: list[str]) -> None:
    """The command line knows this command and its options."""
    assert words[0] == "skipplan"
    command: Any = get_command(app)
    for position, word in enumerate(words[1:]):
        if not hasattr(command, "commands"):
            options = [each for each in words[1 + position :] if each.startswith("--")]
            known = {name for parameter in command.params for name in parameter.opts}
            assert set(options) <= known
            return
        command = command.commands[word]


def test_ray_accepts_the_launchers_file():
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    config = load("ray-cluster.yaml")
    jsonschema.validate(config, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**config, "worker_start_commands": []}, schema)
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in line for line in starts if " start " in line)


@pytest.mark.parametrize("name", ["kuberay-raycluster.yaml", "kuberay-rayjob.yaml"])
def test_manifests_hold_known_fields_and_fit_the_program(name: str):
    manifest = load(name)
    assert manifest["apiVersion"] == "ray.io/v1"
    spec = manifest["spec"]
    if manifest["kind"] == "RayJob":
        assert set(spec) <= JOB_FIELDS
        check_command(spec["entrypoint"].split())
        assert set(yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]) <= set(ENVIRONMENT)
        spec = spec["rayClusterSpec"]
    assert set(spec) <= CLUSTER_FIELDS
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["rayVersion"] == version("ray")
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    assert set(groups[0]) <= HEAD_FIELDS
    for group in groups[1:]:
        assert set(group) <= WORKER_FIELDS
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in groups:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())  # as the CRD wants them
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["image"] == IMAGE
        assert {mount["name"] for mount in container["volumeMounts"]} <= {volume["name"] for volume in pod["volumes"]}
        assert set(container["resources"]) == {"limits", "requests"}
    assert groups[0]["rayStartParams"]["num-cpus"] == "0"


def test_compose_file_keeps_the_database_to_itself():
    compose = load("docker-compose.yaml")
    services = compose["services"]
    assert set(services) == {"database", "schema", "serve"}
    for service in services.values():
        assert "ports" not in service and "network_mode" not in service
        assert set(service.get("depends_on", {})) <= set(services)
        assert set(service["networks"]) <= set(compose["networks"])
    assert "healthcheck" in services["database"]
    for name in ("schema", "serve"):
        assert services[name]["image"] == IMAGE
        check_command(services[name]["command"])
        assert set(services[name]["environment"]) - {"SKIPPLAN_LOG", "RAY_AUTH_MODE"} <= set(ENVIRONMENT)
    written = (FILES / "docker-compose.yaml").read_text()
    assert re.findall(r"POSTGRES_PASSWORD(?!:\?set it in \.env)\}", written) == []  # no default, no literal


def test_compose_file_serves_an_export_as_its_own_script_does(tmp_path: Path):
    compose = load("vllm-compose.yaml")
    (service,) = compose["services"].values()
    known = {"image", "command", "environment", "volumes", "ports", "shm_size", "deploy", "healthcheck", "restart"}
    assert set(service) == known and re.fullmatch(r"vllm/vllm-openai:v\d+\.\d+\.\d+", service["image"])
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlavaForConditionalGeneration"]}))
    served = shlex.split(vllm.command(tmp_path, "/model"))
    assert served[:3] == ["exec", "vllm", "serve"]  # the image's entry point
    place = service["command"].index("--served-model-name")
    assert [*service["command"][:place], *service["command"][place + 2 :]] == served[3:]
    export, cache = (volume.split(":") for volume in service["volumes"])
    assert export[-2:] == ["/model", "ro"] and cache[0] in compose["volumes"]
    assert service["volumes"][0].startswith("${SKIPPLAN_EXPORT:?")  # no default
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert set(service["healthcheck"]) == {"test", "interval", "timeout", "retries", "start_period"}
    test = service["healthcheck"]["test"]
    assert test[:3] == ["CMD", "python3", "-c"] and "/health" in test[3]
    compile(test[3], "healthcheck", "exec")
    assert all(isinstance(value, str) for value in service["environment"].values())


def test_dockerfile_copies_what_is_there_and_ends_unprivileged():
    lines = re.sub(r"\\\n", " ", (FILES / "Dockerfile").read_text()).splitlines()
    instructions = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    known = {"FROM", "ARG", "RUN", "WORKDIR", "COPY", "USER", "ENV", "CMD"}
    assert {name for name, _ in instructions} <= known
    for _, argument in (each for each in instructions if each[0] == "COPY"):
        *sources, _ = argument.split()
        assert all((PROJECT / source).exists() for source in sources), sources
    python = next(argument for name, argument in instructions if name == "FROM")
    assert re.fullmatch(r"python:3\.1[1-9]-slim", python)
    users = [argument for name, argument in instructions if name == "USER"]
    assert users == ["skipplan"]
    check_command(json.loads(next(argument for name, argument in instructions if name == "CMD")))
    assert any("RAY_AUTH_MODE=token" in argument for name, argument in instructions if name == "ENV")
    extras = re.search(r'"\.\[([\w,]+)\]"', " ".join(lines))
    assert extras is not None
    optional = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras[1].split(",")) <= set(optional)
