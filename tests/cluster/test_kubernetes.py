"""The configurations for clusters: they can be read, and what they run is what the command line takes."""

from __future__ import annotations

import json
import re
import shlex

import pytest
import typer
import yaml
from places import ROOT

from lloco_engine.cli import app

FOLDER = ROOT / "docker" / "kubernetes"
VERSION = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]


def check(command: str) -> str:
    """Parse a command line as the shell and `lloco` do, without running it; the name of its command."""
    name, *arguments = shlex.split(command, comments=True)
    assert name == "lloco"
    root = typer.main.get_command(app)
    found = root.commands[arguments[0]]
    found.make_context(arguments[0], arguments[1:])
    return arguments[0]


def test_the_job_that_ingests_runs_a_command_that_there_is():
    (job,) = yaml.safe_load_all((FOLDER / "ingest.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == VERSION
    assert check(job["spec"]["entrypoint"]) == "ingest"
    asked = shlex.split(job["spec"]["entrypoint"])
    (group,) = cluster["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert asked[asked.index("--ray-workers") + 1] == str(group["replicas"])
    assert asked[asked.index("--ray-gpus") + 1] == container["resources"]["limits"]["nvidia.com/gpu"]
    for pod in (cluster["headGroupSpec"]["template"]["spec"], group["template"]["spec"]):
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for one in pod["containers"] for mount in one["volumeMounts"]} == volumes


def test_the_engine_asks_the_servers_that_there_are():
    service, servers, engine, _ = yaml.safe_load_all((FOLDER / "answer.yaml").read_text(encoding="utf-8"))
    assert servers["spec"]["serviceName"] == service["metadata"]["name"]
    name, port = servers["metadata"]["name"], service["spec"]["ports"][0]["port"]
    (container,) = engine["spec"]["template"]["spec"]["containers"]
    urls = [f"http://{name}-{number}.{name}:{port}" for number in range(servers["spec"]["replicas"])]
    assert container["args"][-1] == f"vllm:{','.join(urls)}#/models/decoder"
    assert check(shlex.join(["lloco", *container["args"]])) == "serve"
    (server,) = servers["spec"]["template"]["spec"]["containers"]
    asked = server["command"]
    connector = json.loads(asked[asked.index("--kv-transfer-config") + 1])
    assert connector["kv_connector_module_path"] == "lloco_integrations.vllm.connector"
    assert connector["kv_connector_extra_config"].keys() == {"store", "pool_mib", "key_file"}
    for pod in (servers, engine):
        spec = pod["spec"]["template"]["spec"]
        mounted = {mount["name"] for one in spec["containers"] for mount in one["volumeMounts"]}
        assert mounted == {volume["name"] for volume in spec["volumes"]}


def test_the_image_can_be_built_as_the_guide_says():
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    guide = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^ +(docker build .*)$", guide, re.MULTILINE)
    assert f"ray[default]=={VERSION}" in line
    for argument in re.findall(r"--build-arg (\w+)=", line):
        assert re.search(rf"^ARG {argument}\b", dockerfile, re.MULTILINE)


@pytest.mark.parametrize(
    "command",
    re.findall(r"^ +(lloco (?:ingest|refine) .*)$", (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8"), re.M),
)
def test_a_command_of_the_guide_is_one_that_there_is(command):
    assert check(command.split("  #")[0].rstrip()) in ("ingest", "refine")
