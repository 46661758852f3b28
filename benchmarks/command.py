"""What the command lines of the benchmarks have in common."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any


def parser_of(
    module: str, doc: str, server_args: str | None = "further flags of every server"
) -> argparse.ArgumentParser:
    """With --json and, after --, flags of the server (None: it starts none)."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=doc.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    if server_args:
        parser.add_argument("server_args", nargs="*", help=f"after --: {server_args}")
    return parser


def write_results(file: Path | None, results: Mapping[str, Any]) -> None:
    """As JSON, with when and how they were taken."""
    about = {
        "date": date.today().isoformat(),
        "command": " ".join(map(without_folders, sys.orig_argv)),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": version("torch"),
    }
    if file:
        file.write_text(json.dumps({**about, **results}, indent=1) + "\n")


def without_folders(word: str) -> str:
    """A word of a command line; of a path, or a flag with one, its last name: folders are nobody's business."""
    flag, is_flag, value = word.rpartition("=")
    path = Path(value)
    return f"{flag}{is_flag}{path.name}" if path.name and path.parent.is_dir() else word
