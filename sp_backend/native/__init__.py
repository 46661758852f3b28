"""Operators in C++, compiled on the machine that runs them, once: for its CPU, against the installed torch.

A source NAME.cpp beside this file, with the headers there, registers operators in `torch.ops`. What is compiled is kept
below the cache folder under a name made of everything that it depends on, and written whole, so processes that start
together compile once and a changed source, torch, compiler or CPU never meets an old library. Pure until `load`: no
torch.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from sp_backend.config import cache_folder

SOURCES: dict[str, frozenset[str]] = {  # name -> what the CPU must have, as in /proc/cpuinfo
    "attention": frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"}),
    "passes": frozenset(),
}
FLAGS = ("-O3", "-march=native", "-std=c++20", "-fPIC", "-shared", "-Wl,--no-undefined")
TIMEOUT = 300.0  # s, for the compiler, and for another process that is compiling


class Unavailable(RuntimeError):
    """Why a source cannot be compiled or loaded here."""


@cache
def load(source: str) -> None:
    """Make the operators of a source available in this process. Raises Unavailable."""
    import torch

    path = library(source)
    try:
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    except OSError as error:
        raise Unavailable(f"{path} cannot be loaded: {error}") from error


def choose_kernel() -> tuple[str, str]:
    """The attention kernel for this machine, a name in KERNELS, and why. Compiles it if need be."""
    try:
        library("attention")
    except Unavailable as reason:
        return "torch_cpu", f"the native kernel cannot be used: {reason}"
    return "native", "compiled for this CPU"


@cache
def library(source: str) -> Path:
    """The compiled source, compiled now if it is not kept. Raises Unavailable."""
    cpu = _cpu()
    missing = SOURCES[source] - set(cpu.split())
    if missing:
        raise Unavailable(f"this CPU lacks {', '.join(sorted(missing))}")
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise Unavailable("there is no C++ compiler: install g++, or name one in CXX")
    code = Path(__file__).with_name(f"{source}.cpp")
    files = [code, *sorted(code.parent.glob("*.h"))]
    parts = [file.read_bytes() for file in files], version("torch"), _version(compiler), cpu, " ".join(FLAGS)
    key = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    path = cache_folder() / "native" / f"{source}-{key}.so"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path.with_suffix(".lock")):
            if not path.exists():
                _compile(compiler, code, path)
    except OSError as error:
        raise Unavailable(f"{path.parent} cannot be written: {error}; set XDG_CACHE_HOME") from error
    return path


def _compile(compiler: str, code: Path, path: Path) -> None:
    print(f"sp-serve: compiling {code.name} for this CPU (once, some seconds)", file=sys.stderr, flush=True)
    spec = find_spec("torch")
    assert spec is not None and spec.submodule_search_locations
    torch = Path(spec.submodule_search_locations[0])
    includes = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
    draft = path.with_suffix(f".{os.getpid()}")
    links = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
    try:
        done = subprocess.run(
            [compiler, *FLAGS, *includes, str(code), "-o", str(draft), *links],
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        if done.returncode:
            raise Unavailable(f"{compiler} failed on {code.name}: {_first_error(done.stderr)}")
        draft.replace(path)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{compiler} took more than {TIMEOUT:g} s for {code.name}") from error
    finally:
        draft.unlink(missing_ok=True)


def _first_error(text: str) -> str:
    lines = [line for line in text.splitlines() if "error" in line] or text.splitlines()
    return lines[0] if lines else "it says nothing"


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Of one process at a time; freed by the system if its owner dies."""
    deadline = time.monotonic() + TIMEOUT
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise Unavailable(f"another process has held {path} for {TIMEOUT:g} s") from None
                time.sleep(0.05)
        yield


def _version(compiler: str) -> str:
    try:
        done = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{compiler} cannot be run: {error}") from error
    return done.stdout


def _cpu() -> str:
    """The machine, the CPU's model and its features."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    fields = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    named = {name.strip(): value.strip() for name, value in fields.items()}
    return f"{platform.machine()} {named.get('model name', '')} {named.get('flags', '')}"
