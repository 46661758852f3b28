"""Every command in the README and in docs/ runs: the same words, on a tiny model, with small numbers."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.launched import ROOT, LaunchedServer, free_port
from tests.checkpoints import make_checkpoint

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "server" / "default_model" / "README.md"]
NOT_RUN = {  # command -> why
    "make test": "it is what runs this",
    "python3 -m venv": "it fetches from PyTorch's own index",
    "make bench-peers": "it fetches and compiles other libraries",
    "python -m benchmarks.prefill --compare peers": "it needs them",
    "python -m benchmarks.attention --only peers": "it needs them",
    "pip install -e": "it fetches SGLang and what it pins: several GB",
    "python -m sglang.launch_server": "tests/sglang serves with these flags",
    "PYTHONPATH=tests/sglang/shims": "it needs SGLang",
    "python -m server.default_model": "training and its evaluation take most of an hour",
}
SMALLER = {"32768": "200", "65536": "3000", "2000": "150", "8000": "250", "64": "4", "16": "3", "256k": "8192"}
QUICKER = {  # module -> flags that make it quick
    "benchmarks.prefill": "--lengths 128 --repeats 1",
    "benchmarks.decode": "--contexts 64 --streams 1 2 --repeats 1 --tokens 24",
    "benchmarks.serve": "--lengths 16 600 --repeats 1 --short-repeats 1 --streams 4 --prefill-tokens 1000",
    "benchmarks.greedy": "--sp-sizes 2 --output-tokens 4 --setups auto sharded_q",
    "benchmarks.attention": "--only kernel ranks --lengths 512 8192 --repeats 1 --quick",
    "benchmarks.startup": "--quick",
    "benchmarks.memory": "--lengths 128",
    "benchmarks.planner": "--repeats 1 --seconds 0",
    "benchmarks.published": "--ranks 2 --tokens 256 --repeats 1",
}
WITHOUT_SERVER = {"benchmarks.attention", "benchmarks.planner", "benchmarks.published"}
COMPILED = {"benchmarks.attention"}  # nothing to measure without the native kernel


def commands() -> list[str]:
    found = []
    for page in PAGES:
        for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            lines = block.replace("\\\n", " ").splitlines()
            found += [line.split(" # ")[0].strip().removeprefix(".venv/bin/") for line in lines if line.strip()]
    return list(dict.fromkeys(found))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "qwen2")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[LaunchedServer]:
    with LaunchedServer("--model-path", str(model), "--sp-size", "2", "--max-total-tokens", "8192") as launched:
        yield launched


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Empty at first; servers measure the machine once."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("command", [c for c in commands() if not c.startswith((*NOT_RUN, "torchrun"))])
def test_command(command: str, model: Path, server: LaunchedServer, cache: Path, tmp_path: Path) -> None:
    words = shlex.split(command)
    if words[:3] != ["python", "-m", "sp_backend.explain"]:  # which takes as long for any number of tokens
        words = [SMALLER.get(word, word) for word in words]
    words = [str(model) if word == "FOLDER" else word.replace(":30000", f":{server.port}") for word in words]
    if words == ["make", "serve"]:
        _serves(words + ["-o", f"{sys.prefix}/.serve", f"VENV={sys.prefix}"])
    elif words[0] == "curl":
        answer = subprocess.run([*words, "-fsS"], capture_output=True, text=True, timeout=60, check=True)
        ends = ("stop",) if "response_format" in command else ("stop", "length")  # random weights may draw an end
        wanted = ['"object":"embedding"'] if "/embeddings" in command else [f'"finish_reason":"{end}"' for end in ends]
        assert any(part in answer.stdout for part in wanted)
    elif words[:3] == ["python", "-m", "server.launch"]:
        with LaunchedServer(*words[3:], "--oversubscribe") as launched:
            assert "ready to roll" in launched.output()
    else:
        assert words[:2] == ["python", "-m"], f"no rule for {command!r}"
        words += QUICKER.get(words[2], "").split()
        if words[2].startswith("benchmarks.") and words[2] not in WITHOUT_SERVER:
            words += ["--", "--model-path", str(model), "--max-total-tokens", "8192"]
        _run([sys.executable, *words[1:]], tmp_path, cache)
        outputs = [words[i + 1] for i, word in enumerate(words) if word in ("--json", "--plot", "--timeline")]
        assert all((tmp_path / name).stat().st_size for name in outputs)


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("torchrun")])
def test_torchrun_command(command: str, cache: Path, tmp_path: Path) -> None:
    words = [str(ROOT / word) if word.endswith(".py") else word for word in shlex.split(command)]
    printed = _run([sys.executable, "-m", "torch.distributed.run", *words[1:]], tmp_path, cache)
    error = re.search(r"^max error against full attention: (.*)$", printed, re.MULTILINE)
    assert error and float(error[1]) < 1e-5


def _run(words: list[str], folder: Path, cache: Path) -> str:
    """What the program prints."""
    env = {"PYTHONPATH": str(ROOT), "PATH": "", "XDG_CACHE_HOME": str(cache)}
    if words[2] in COMPILED:
        env = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def _serves(make: list[str]) -> None:
    """`make serve`, on another port, prints that it is ready and a curl line."""
    process = subprocess.Popen(
        [*make, f"SERVE_ARGS=--sp-size 2 --port {free_port()}"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        lines = iter(process.stdout.readline, "")
        assert any("ready to roll" in line for line in lines)
        assert next(lines).startswith("curl ")
    finally:
        process.terminate()
        process.wait(30)


def test_the_cpu_build_is_pinned() -> None:
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text()
    assert "download.pytorch.org/whl/cpu" in (ROOT / "README.md").read_text()
