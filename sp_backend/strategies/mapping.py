"""Reads cycles for the hamilton strategy from a file in MindSpeed's format.

    {"path_num": 2, "in_mapping": [[-1, 1, 0], [0, -1, 1], [1, 0, -1]],
                    "out_mapping": [[-1, 0, 1], [1, -1, 0], [0, 1, -1]]}

out_mapping[r][s] is the path whose piece rank r sends to rank s, in_mapping[r][s] the one it receives from s; -1 is
none. So one is the other transposed, and each path must be one cycle through all ranks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sp_backend.strategies.cycles import check_cycles
from sp_backend.strategies.rings import Cycle


def read_cycles(path: str | Path) -> tuple[Cycle, ...]:
    """path_num cycles, each from rank 0. Raises ValueError that names the file and the entry at fault."""
    try:
        return _cycles(json.loads(Path(path).read_text()))
    except OSError as e:
        raise ValueError(f"mapping file {path} (--sp-mapping) cannot be read: {e.strerror}") from None
    except json.JSONDecodeError as e:
        raise ValueError(f"mapping file {path} (--sp-mapping) is not JSON: {e}") from None
    except ValueError as e:
        raise ValueError(f"mapping file {path} (--sp-mapping): {e}") from None


def _cycles(mapping: Any) -> tuple[Cycle, ...]:
    if not isinstance(mapping, dict) or set(mapping) != {"path_num", "in_mapping", "out_mapping"}:
        raise ValueError("it must be an object of path_num, in_mapping and out_mapping, and nothing else")
    num_paths = mapping["path_num"]
    if type(num_paths) is not int or num_paths < 1:
        raise ValueError(f"path_num must be a positive whole number, not {num_paths!r}")
    outgoing, incoming = (_table(mapping, name, num_paths) for name in ("out_mapping", "in_mapping"))
    ranks = range(len(outgoing))
    if len(incoming) != len(outgoing):
        raise ValueError(f"in_mapping is of {len(incoming)} ranks and out_mapping of {len(outgoing)}; they must agree")
    for r in ranks:
        for s in ranks:
            if outgoing[r][s] != incoming[s][r]:
                raise ValueError(
                    f"out_mapping[{r}][{s}] is {outgoing[r][s]} and in_mapping[{s}][{r}] is {incoming[s][r]}; "
                    "what a rank sends, its peer receives"
                )
    return check_cycles([_walk(outgoing, path) for path in range(num_paths)], len(ranks))


def _table(mapping: dict[str, Any], name: str, num_paths: int) -> list[list[int]]:
    """A square of path numbers, with -1 on the diagonal."""
    rows = mapping[name]
    if not isinstance(rows, list) or not rows or not all(isinstance(r, list) and len(r) == len(rows) for r in rows):
        raise ValueError(f"{name} must be a list of P rows of P numbers, one for each pair of ranks")
    for r, row in enumerate(rows):
        for s, path in enumerate(row):
            if type(path) is not int or not -1 <= path < num_paths:
                raise ValueError(f"{name}[{r}][{s}] is {path!r}; it must be a path (0 to {num_paths - 1}) or -1")
            if r == s and path != -1:
                raise ValueError(f"{name}[{r}][{s}] is {path}; a rank does not send to itself, so it must be -1")
    return rows


def _walk(outgoing: list[list[int]], path: int) -> list[int]:
    """The ranks that a path visits, from rank 0 until it is there again."""
    following = []
    for r, row in enumerate(outgoing):
        if row.count(path) != 1:
            raise ValueError(f"row {r} of out_mapping has path {path} {row.count(path)} times, not once")
        following.append(row.index(path))
    cycle = [0]
    while (rank := following[cycle[-1]]) not in cycle:
        cycle.append(rank)
    if len(cycle) < len(outgoing) or rank != 0:
        raise ValueError(f"path {path} comes back to rank {rank} after ranks {cycle}, not after all {len(outgoing)}")
    return cycle
