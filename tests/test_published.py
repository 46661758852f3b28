"""The table of published numbers: what is fitted, what is predicted, and that each is told apart."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.published import calibrate, evaluate, main
from benchmarks.published_systems import OTHERWISE, SYSTEMS, Constants, System, connections, ports
from sp_backend.presets import preset

SYSTEM_OF = {system.name: system for system in (describe() for describe in SYSTEMS)}


@pytest.fixture(params=SYSTEM_OF)
def system(request: pytest.FixtureRequest) -> System:
    return SYSTEM_OF[request.param]


def test_fewer_constants_are_fitted_than_rows_predicted(system: System) -> None:
    fits = Counter(row.fits for row in system.rows if row.fits)
    assert all(number == 1 for number in fits.values()), "one row for each constant"
    assert len(fits) < sum(row.fits is None for row in system.rows)


def test_the_winner_of_a_comparison_is_never_fitted(system: System) -> None:
    assert not [w.what for w in system.winners if system.rows[w.faster].fits]


def test_fitted_rows_are_exact_and_other_constants_are_the_presets(system: System) -> None:
    constants, fits = calibrate(system), {row.fits for row in system.rows}
    for row in system.rows:
        if row.fits:
            assert row.predict(constants) == pytest.approx(row.published, rel=1e-3)
    assert all(n in fits or getattr(constants, n) == getattr(Constants(), n) for n in Constants.__slots__)


def test_predicted_rows_have_no_part_in_the_calibration(system: System) -> None:
    alone = replace(system, rows=tuple(row for row in system.rows if row.fits), winners=())
    assert calibrate(alone) == calibrate(system)


def test_every_row_that_is_off_says_why(system: System) -> None:
    off = {r.what for r in evaluate(system).predictions if abs(r.error) > 0.15}
    assert off <= set(system.missed) <= {row.what for row in system.rows}


def test_connections_limit_a_pair_beside_its_ports() -> None:
    topology = preset("pcie4-4").topology
    limited = connections(topology, 5e9)
    names = [link.resources[-1] for link in limited.links]
    assert len(set(names)) == 12 and {limited.resources[n] for n in names} == {5e9}
    assert limited.resources.items() >= topology.resources.items()
    assert set(ports(topology, 5e9).resources.values()) == {5e9}


def test_the_command_prints_every_row_and_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", str(tmp_path / "published.json")]) == 0
    printed, found = capsys.readouterr().out, json.loads((tmp_path / "published.json").read_text())
    assert [s["name"] for s in found["systems"]] == list(SYSTEM_OF)
    assert all(f"| {s.name} | {row.what} |" in printed for s in SYSTEM_OF.values() for row in s.rows)
    assert found["summary"] in printed and all(what in printed for what in OTHERWISE)


def test_shares_are_measured_on_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--measure", "--ranks", "2", "--tokens", "256", "--repeats", "1"]) == 0
    printed = capsys.readouterr().out
    assert all(f"| 2 | {layout} | {rank} | " in printed for layout in ("contiguous", "zigzag") for rank in (0, 1))
