"""Edge-disjoint Hamiltonian cycles, and mapping files that name them."""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from sp_backend.strategies.cycles import check_cycles, edge_disjoint, node_cycles, stride_cycles
from sp_backend.strategies.mapping import read_cycles

Cycles = tuple[tuple[int, ...], ...]


def edges(cycle: tuple[int, ...]) -> list[tuple[int, int]]:
    return list(pairwise([*cycle, cycle[0]]))


@pytest.mark.parametrize("num_ranks", range(2, 25))
def test_every_link_is_on_one_cycle(num_ranks: int) -> None:
    """A full decomposition, except of 4 and 6 ranks, which have none."""
    cycles = check_cycles(edge_disjoint(num_ranks), num_ranks)
    assert len(cycles) == {4: 2, 6: 4}.get(num_ranks, num_ranks - 1)


@pytest.mark.parametrize(("num_ranks", "count"), [(2, 1), (4, 2), (6, 2), (7, 6), (8, 4), (16, 8), (64, 32)])
def test_strides_coprime_to_the_number_of_ranks(num_ranks: int, count: int) -> None:
    cycles = check_cycles(stride_cycles(num_ranks), num_ranks)
    assert len(cycles) == count
    assert cycles[0] == tuple(range(num_ranks))
    if num_ranks > 2:  # the second goes the other way
        assert {(b, a) for a, b in edges(cycles[0])} == {*edges(cycles[1])}


@pytest.mark.parametrize("num_nodes", [2, 3, 4])
@pytest.mark.parametrize(("size", "count"), [(1, 1), (2, 2), (3, 2), (4, 4), (5, 4), (7, 7), (8, 8)])
def test_paths_through_nodes_use_each_rank_s_own_link_once(num_nodes: int, size: int, count: int) -> None:
    """All n paths of a node's n(n-1) links, but for nodes of 3 and 5, whose ranks and one more are 4 and 6."""
    cycles = check_cycles(node_cycles(num_nodes, size), num_nodes * size)
    between = [(a, b) for c in cycles for a, b in edges(c) if a // size != b // size]
    assert len(cycles) == count and len(between) == num_nodes * count
    assert max(Counter(a for a, _ in between).values()) == max(Counter(b for _, b in between).values()) == 1


@pytest.mark.parametrize(
    ("cycles", "message"),
    [
        ((), "none are given"),
        (((0, 1, 2), (0, 1, 3)), r"cycles\[1\] .*has rank 3; there are ranks 0 to 2"),
        (((0, 1, 2), (0, 2)), r"cycles\[1\] .*misses rank 1"),
        (((0, 1, 1, 2),), r"cycles\[0\] .*visits rank 1 2 times, not once"),
        (((0, 1, 2), (1, 2, 0)), r"cycles\[1\] .*: edge 1>2 is in cycles\[0\] too"),
    ],
)
def test_cycles_that_do_not_fit_are_refused(cycles: Cycles, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_cycles(cycles, 3)


def mapping_of(cycles: Cycles) -> dict[str, Any]:
    ranks = range(len(cycles[0]))
    path = {edge: i for i, cycle in enumerate(cycles) for edge in edges(cycle)}
    return mapping(len(cycles), [[path.get((r, s), -1) for s in ranks] for r in ranks])


def mapping(num_paths: int, out: list[list[int]]) -> dict[str, Any]:
    incoming = [list(column) for column in zip(*out, strict=True)]
    return {"path_num": num_paths, "out_mapping": out, "in_mapping": incoming}


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_a_mapping_file_gives_the_cycles_back(tmp_path: Path) -> None:
    cycles = edge_disjoint(8)[:4]
    rotated = tuple(c[c.index(0) :] + c[: c.index(0)] for c in cycles)
    assert read_cycles(write(tmp_path / "mapping.json", mapping_of(cycles))) == rotated


GOOD = mapping_of(((0, 1, 2, 3), (0, 3, 2, 1)))
OUT = GOOD["out_mapping"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "must be an object of path_num, in_mapping and out_mapping"),
        (GOOD | {"paths": 1}, "and nothing else"),
        (GOOD | {"path_num": 0}, "path_num must be a positive whole number, not 0"),
        (GOOD | {"out_mapping": OUT[:3]}, "out_mapping must be a list of P rows of P numbers"),
        (GOOD | {"path_num": 1}, r"out_mapping\[0\]\[3\] is 1; it must be a path \(0 to 0\) or -1"),
        (GOOD | {"in_mapping": OUT}, r"out_mapping\[0\]\[1\] is 0 and in_mapping\[1\]\[0\] is 1"),
        (GOOD | {"in_mapping": [[-1]]}, "in_mapping is of 1 ranks and out_mapping of 4"),
        (mapping(2, [[0, *OUT[0][1:]], *OUT[1:]]), r"out_mapping\[0\]\[0\] is 0; a rank does not send to itself"),
        (mapping(2, [[-1, 0, 0, 1], *OUT[1:]]), "row 0 of out_mapping has path 0 2 times, not once"),
        (
            mapping(2, [[-1, 0, 1, -1], [0, -1, -1, 1], [1, -1, -1, 0], [-1, 1, 0, -1]]),
            r"path 0 comes back to rank 0 after ranks \[0, 1\], not after all 4",
        ),
    ],
)
def test_a_bad_mapping_is_refused_with_what_is_wrong_and_where(tmp_path: Path, content: Any, message: str) -> None:
    path = write(tmp_path / "mapping.json", content)
    with pytest.raises(ValueError, match=f"mapping.json .*--sp-mapping.*{message}"):
        read_cycles(path)


def test_a_file_that_is_not_there_or_not_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none.json .*cannot be read: No such file"):
        read_cycles(tmp_path / "none.json")
    (tmp_path / "text").write_text("0 1 2")
    with pytest.raises(ValueError, match="text .*is not JSON: .*line 1"):
        read_cycles(tmp_path / "text")
