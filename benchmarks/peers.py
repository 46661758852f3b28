"""The environment of `make bench-peers`, in which the libraries run that benchmarks compare with."""

from __future__ import annotations

import subprocess

from benchmarks.launched import ROOT

PYTHON = ROOT / ".venv-peers" / "bin" / "python"


def missing() -> str | None:
    """Why the peers cannot run, if they cannot."""
    return None if PYTHON.exists() else f"{PYTHON} is missing: make bench-peers"


def versions(*packages: str) -> dict[str, str]:
    """Of installed packages there."""
    code = f"import importlib.metadata as m; print(*(f'{{n}}={{m.version(n)}}' for n in {packages}))"
    done = subprocess.run([str(PYTHON), "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return dict(word.split("=") for word in done.stdout.split())
