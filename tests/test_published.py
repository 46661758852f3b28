"""The table of published numbers: what is fitted, what is predicted, and that each is told apart."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.published import SYSTEMS, Constants, System, calibrate, compare, connected, main, predicted
from sp_backend.topology import preset

NAMES = [describe().name for describe in SYSTEMS]


@pytest.fixture(params=SYSTEMS, ids=NAMES)
def system(request: pytest.FixtureRequest) -> System:
    return request.param()  # type: ignore[no-any-return]


def test_fewer_constants_are_fitted_than_rows_predicted(system: System) -> None:
    fits = Counter(row.fits for row in system.rows if row.fits)
    assert all(number == 1 for number in fits.values()), "one row for each constant"
    assert sum(fits.values()) < len(system.rows) - sum(fits.values())


def test_only_the_slower_side_of_a_comparison_is_fitted(system: System) -> None:
    """The side whose gain is to be predicted never is."""
    assert not [w.what for w in system.winners if system.rows[w.faster].fits]


def test_a_fitted_row_is_exact_and_no_other_constant_moves(system: System) -> None:
    constants, fits = calibrate(system), {row.fits for row in system.rows}
    for row in system.rows:
        if row.fits:
            assert row.predict(constants) == pytest.approx(row.published, rel=1e-3)
    for name in ("slowness", "byte_seconds", "pass_seconds"):
        assert name in fits or getattr(constants, name) == getattr(Constants(), name)


def test_a_predicted_row_has_no_part_in_the_calibration(system: System) -> None:
    fitted_only = tuple(row for row in system.rows if row.fits)
    alone = System(system.name, system.hardware, system.source, system.assumed, fitted_only, ())
    assert calibrate(alone) == calibrate(system)


def test_connections_limit_a_pair_beside_its_ports() -> None:
    links = connected(preset("pcie4-4").topology, 5e9)
    names = [link.resources[-1] for link in links.links]
    assert len(set(names)) == 12 and {links.resources[n] for n in names} == {5e9}
    assert links.resources["rank0.out"] == preset("pcie4-4").topology.resources["rank0.out"]


def test_the_command_prints_every_row_and_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", str(tmp_path / "published.json")]) == 0
    printed, found = capsys.readouterr().out, json.loads((tmp_path / "published.json").read_text())
    results, winners, _ = compare()
    assert [row["what"] for row in found["rows"]] == [r.what for r in results]
    assert all(f"| {r.system} | {r.what} |" in printed for r in results)
    assert f"{len(predicted(results))} rows predicted" in printed and len(found["winners"]) == len(winners)
