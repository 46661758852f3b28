"""Machines as they were measured, in files for the next start. Pure: no torch."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from sp_backend.config import cache_folder
from sp_backend.topology import Machine

logger = logging.getLogger(__name__)


def file_of(kind: str, about: Sequence[object], folder: Path | None = None) -> Path:
    """Where a machine of some kind is kept: under a name made of `about`, JSON values that say all that may change it,
    and of this package's code, which is what is timed. folder: None: sp-serve below XDG_CACHE_HOME or ~/.cache.
    """
    key = hashlib.sha256(json.dumps([about, _sources()]).encode()).hexdigest()[:16]
    return (folder or cache_folder()) / f"{kind}-{key}.json"


def read_machine(path: Path, num_ranks: int) -> Machine | None:
    """None if there is no file, or none of use: logged."""
    try:
        machine = Machine.from_json(path.read_bytes(), str(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("a file of an earlier start is no use: %s", error)
        return None
    if machine.num_ranks != num_ranks:
        logger.warning("a file of an earlier start is no use: %s has %d ranks", path, machine.num_ranks)
        return None
    return machine


def write_machine(path: Path, machine: Machine) -> None:
    """Whole or not at all. A folder that cannot be written costs the next start a measurement."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_text(machine.to_json())
        draft.replace(path)
    except OSError as error:
        logger.warning("what was measured is not kept: %s", error)


def _sources() -> str:
    """Digest of the package's code."""
    files = sorted(f for f in Path(__file__).parent.rglob("*") if f.suffix in (".py", ".cpp", ".h"))
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()
