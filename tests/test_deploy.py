"""What deploy/ promises is what the server does: flags, ports, probes, time to drain."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest
import yaml

from benchmarks.launched import ROOT
from server.arguments import parse
from server.service import Phase
from tests.server.live import live_server

DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile.cpu").read_text()
DEPLOYMENT, SERVICE = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
COMPOSED = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["sp-serve"]
POD: dict[str, Any] = DEPLOYMENT["spec"]["template"]
(CONTAINER,) = POD["spec"]["containers"]
PROBES = {kind: CONTAINER[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness", "readiness")}


def instruction(name: str) -> str:
    (text,) = re.findall(rf"^{name} (.*)$", DOCKERFILE, re.MULTILINE)
    return str(text)


ENTRYPOINT: list[str] = json.loads(instruction("ENTRYPOINT"))


@pytest.mark.parametrize(
    "words",
    [json.loads(instruction("CMD")), CONTAINER["args"], COMPOSED["command"]],
    ids=["docker", "kubernetes", "compose"],
)
def test_flags(words: list[str]) -> None:
    args = parse([*ENTRYPOINT[1:], *words])
    assert (args.host, args.port, args.sp_size) == ("0.0.0.0", 30000, 2)


def test_ports() -> None:
    port = parse(ENTRYPOINT[1:]).port
    assert [each["containerPort"] for each in CONTAINER["ports"]] == [port] == [int(instruction("EXPOSE"))]
    assert [each["targetPort"] for each in SERVICE["spec"]["ports"]] == [each["name"] for each in CONTAINER["ports"]]
    assert {CONTAINER[f"{kind}Probe"]["httpGet"]["port"] for kind in PROBES} == {"http"}
    assert POD["metadata"]["annotations"]["prometheus.io/port"] == str(port)
    assert COMPOSED["ports"] == [f"127.0.0.1:{port}:{port}"]


def test_the_service_finds_the_pods() -> None:
    labels = POD["metadata"]["labels"]
    assert SERVICE["spec"]["selector"] == DEPLOYMENT["spec"]["selector"]["matchLabels"] == labels


@pytest.mark.parametrize(
    ("phase", "answers"),
    [
        (Phase.STARTING, {"startup": 503, "liveness": 200, "readiness": 503}),
        (Phase.READY, {"startup": 200, "liveness": 200, "readiness": 200}),
        (Phase.DRAINING, {"startup": 503, "liveness": 200, "readiness": 503}),
    ],
)
def test_probes(phase: Phase, answers: dict[str, int]) -> None:
    """A pod that drains gets no new requests, and is not killed for it."""
    with live_server(None, "--api-key", "secret") as live:
        live.service.phase = phase
        assert {kind: httpx.get(live.url + path).status_code for kind, path in PROBES.items()} == answers
        assert httpx.get(live.url + POD["metadata"]["annotations"]["prometheus.io/path"]).status_code == 200


def test_there_is_time_to_drain() -> None:
    drain = parse(CONTAINER["args"]).drain_timeout
    waits = int(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][1])
    assert POD["spec"]["terminationGracePeriodSeconds"] >= drain + waits + 10
    minutes = int(COMPOSED["stop_grace_period"].removesuffix("m"))
    assert 60 * minutes >= parse(COMPOSED["command"]).drain_timeout + 10


def test_a_read_only_container_can_write_what_it_must() -> None:
    home = f"/home/{instruction('USER')}"
    mounted = {mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    assert mounted == {"/tmp", f"{home}/.cache"} and CONTAINER["securityContext"]["readOnlyRootFilesystem"]
    volumes = {volume["name"] for volume in POD["spec"]["volumes"]}
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == volumes
