"""Machines: presets and their names, JSON files and what is said about bad ones, interpolated kernel rates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sp_backend.presets import load_machine, preset
from sp_backend.topology import KernelRates

PRESETS = ["nvlink4-8", "nvlink5-8", "pcie4-4", "pcie4-8", "pcie5-8", "nic200-4", "nic400-16", "loopback-2"]
PRESETS += ["2xnvlink4-8/nic400", "4xpcie5-4/nic200-shared", "nvlink4-1"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_same_after_a_trip_through_its_file(name: str, tmp_path: Path) -> None:
    machine = preset(name)
    file = tmp_path / "machine.json"
    file.write_text(machine.to_json())
    assert load_machine(file) == machine


def links(name: str) -> dict[tuple[int, int], tuple[str, ...]]:
    return {pair: link.resources for pair, link in preset(name).topology.by_pair().items()}


def test_ranks_of_a_switch_meet_there_and_others_share_the_way_to_the_root() -> None:
    pcie = links("pcie4-4")
    assert pcie[0, 1] == ("rank0.out", "rank1.in")
    assert pcie[1, 2] == ("rank1.out", "switch0.out", "switch1.in", "rank2.in")
    assert set(pcie[0, 3]) & set(pcie[1, 2]) == {"switch0.out", "switch1.in"}


def test_nodes_are_joined_by_a_nic_for_each_rank_or_one_for_the_node() -> None:
    own, shared = links("2xnvlink4-2/nic400"), links("2xnvlink4-2/nic400-shared")
    assert own[0, 1] == shared[0, 1] == ("rank0.out", "rank1.in")
    assert own[0, 2] == ("nic0.out", "nic2.in") and own[1, 3] == ("nic1.out", "nic3.in")
    assert shared[0, 2] == shared[1, 3] == ("nic0.out", "nic1.in")


def test_the_first_ranks_of_a_machine_keep_their_links_and_drop_what_only_others_use() -> None:
    machine = preset("pcie4-8").first(2)
    assert machine.num_ranks == 2 and set(machine.topology.resources) == {
        "rank0.out",
        "rank0.in",
        "rank1.out",
        "rank1.in",
    }
    with pytest.raises(ValueError, match="a topology of 2 ranks has no 4"):
        machine.first(4)


@pytest.mark.parametrize("name", ["nvlink9-8", "nvlink4", "nvlink4-0", "0xnvlink4-8/nic400", "nvlink4-8/nic100", "a b"])
def test_an_unknown_name_is_refused_with_the_grammar(name: str) -> None:
    with pytest.raises(ValueError, match=r"\[NODESx\]KIND-RANKS"):
        preset(name)


@pytest.mark.parametrize("name", ["2xnvlink4-8", "nvlink4-8/nic400"])
def test_a_nic_joins_several_nodes_and_only_those(name: str) -> None:
    with pytest.raises(ValueError, match="several nodes need a NIC, and one node none"):
        preset(name)


BAD: list[tuple[str, list[Any], Any, str]] = [
    ("capacity", ["topology", "resources", "rank0.in"], 0, r"resources\['rank0.in'\] is 0.*bytes/s above 0"),
    ("not a number", ["topology", "resources", "rank0.in"], "fast", r"Expected `float`, got `str`"),
    ("rank", ["topology", "links", 1, "src"], 7, r"links\[1\] \(7 -> 0\): src is 7; it must be a rank below 2"),
    ("itself", ["topology", "links", 0, "dst"], 0, r"links\[0\] \(0 -> 0\): dst is 0; it must be another rank"),
    ("latency", ["topology", "links", 0, "latency"], -1, r"links\[0\] \(0 -> 1\): latency is -1"),
    ("resource", ["topology", "links", 0, "resources"], ["wire"], r"resource is wire; it must be a key of"),
    ("no resource", ["topology", "links", 0, "resources"], [], r"resources is empty; it must be what the link's bytes"),
    ("twice", ["topology", "links", 0, "resources"], ["rank0.in"] * 2, r"resources is \['rank0.in', 'rank0.in'\]"),
    ("a billion ranks", ["topology", "num_ranks"], 10**9, r"none from rank to rank 0 -> 2, 0 -> 3"),
    ("missing link", ["topology", "links"], [], r"none from rank to rank 0 -> 1, 1 -> 0"),
    ("overlap", ["rates", "overlap"], 2, r"rates.overlap is 2.*between 0 and 1"),
    ("rate", ["rates", "copy_bytes"], 0, r"rates.copy_bytes is 0.*above 0"),
    ("axis", ["rates", "kernel", "queries"], [64, 16], r"rates.kernel.queries is .*ascending"),
    ("table", ["rates", "kernel", "full"], [[1.0]], r"rates.kernel.full is rows of \[1\]"),
    ("no rates", ["rates"], None, r"Expected `object`, got `null`"),
]


@pytest.mark.parametrize(("path", "value", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_a_bad_file_is_refused_with_its_name_and_the_field(
    path: list[Any], value: Any, message: str, tmp_path: Path
) -> None:
    document = json.loads(preset("nvlink4-2").to_json())
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message) as refused:
        load_machine(file)
    assert str(refused.value).startswith(str(file))


def test_a_file_that_is_not_json_or_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="broken.json: Input data was truncated"):
        load_machine(tmp_path / "broken.json")
    with pytest.raises(ValueError, match="none.json: no such file"):
        load_machine(tmp_path / "none.json")


def test_kernel_rates_are_interpolated_in_logarithms_and_constant_beyond_the_table() -> None:
    rates = KernelRates((16, 64), (100, 10000), ((1e9, 4e9), (4e9, 16e9)), (1e9, 4e9))
    assert rates.full_rate([16, 64, 1, 1000], [100, 10000, 1, 10**6]).tolist() == pytest.approx([1e9, 16e9, 1e9, 16e9])
    assert float(rates.full_rate(32, 1000)) == pytest.approx(4e9)
    assert float(rates.causal_rate(32)) == pytest.approx(2e9)
