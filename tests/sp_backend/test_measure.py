"""Measuring on live ranks: every rank has the same machine, and a file spares the next start the work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sp_backend import kept
from sp_backend.config import cache_folder
from sp_backend.measure import machine_of
from sp_backend.planner import Planner
from sp_backend.presets import preset
from sp_backend.shape import ModelShape
from sp_backend.topology import Machine
from sp_backend.transport.gloo import GlooTransport
from sp_backend.transport.lockstep import LockstepNetwork
from tests.ranks import run_on_ranks

SHAPE = ModelShape(num_heads=4, num_kv_heads=2, head_dim=8)


def machine_on_rank(rank: int, size: int, folder: str, times: int) -> list[Machine]:
    transport = GlooTransport.create(size, size, rank, timeout=30)
    return [machine_of(transport, "torch_cpu", SHAPE, torch.float32, folder=Path(folder)) for _ in range(times)]


@pytest.mark.parametrize("size", [2, 3])
def test_all_ranks_get_one_machine_that_a_planner_takes(size: int, tmp_path: Path) -> None:
    machine, *others = (found[0] for found in run_on_ranks(size, machine_on_rank, str(tmp_path), 1))
    assert others == [machine] * (size - 1)
    assert machine.num_ranks == size
    assert all(1e6 < capacity < 1e13 for capacity in machine.topology.resources.values())
    assert all(1e-7 < link.latency < 1 for link in machine.topology.links)
    assert ("all ranks" in machine.topology.resources) == (size > 2)
    assert Planner(machine, SHAPE, size).choose([(1000, 0)]).seconds > 0


def test_the_second_start_reads_the_file(tmp_path: Path) -> None:
    first, second = run_on_ranks(2, machine_on_rank, str(tmp_path / "new" / "folder"), 2)[0]
    (file,) = (tmp_path / "new" / "folder").iterdir()
    assert first == second == Machine.from_json(file.read_bytes())
    file.write_text(preset("nvlink4-2").to_json())
    assert run_on_ranks(2, machine_on_rank, str(file.parent), 1) == [[preset("nvlink4-2")]] * 2


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", preset("nvlink4-8").to_json()], ids=repr)
def test_a_file_that_is_no_use_is_measured_again(content: str, tmp_path: Path) -> None:
    """Cut short, of another kind, or of another number of ranks."""
    alone = LockstepNetwork(1).rank(0)
    machine_of(alone, "torch_cpu", SHAPE, torch.float32, folder=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(content)
    machine = machine_of(alone, "torch_cpu", SHAPE, torch.float32, folder=tmp_path)
    assert machine.num_ranks == 1 and Machine.from_json(file.read_bytes()) == machine


def test_other_sizes_have_a_file_of_their_own(tmp_path: Path) -> None:
    alone = LockstepNetwork(1).rank(0)
    for dtype in (torch.float32, torch.bfloat16):
        machine_of(alone, "torch_cpu", SHAPE, dtype, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_another_kernel_number_of_threads_or_version_of_what_is_timed_is_measured_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = LockstepNetwork(1).rank(0)

    def measured(kernel: str) -> int:
        machine_of(alone, kernel, SHAPE, torch.float32, folder=tmp_path)
        return len(list(tmp_path.iterdir()))

    assert [measured("torch_cpu"), measured("torch_cpu"), measured("reference")] == [1, 1, 2]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert measured("torch_cpu") == 3
    monkeypatch.setattr(kept, "_sources", lambda: "an edited kernel")
    assert measured("torch_cpu") == 4


def test_any_change_of_the_code_makes_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "native").mkdir()
    monkeypatch.setattr(kept, "__file__", str(tmp_path / "kept.py"))
    files = []
    for name, text in [("slots.py", "1"), ("slots.py", "2"), ("native/attention.h", "3"), ("notes.txt", "4")]:
        (tmp_path / name).write_text(text)
        files.append(kept.file_of("machine", []))
    assert len(set(files)) == 3 and files[2] == files[3]


def test_a_folder_that_cannot_be_written_is_no_failure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    machine = machine_of(
        LockstepNetwork(1).rank(0), "torch_cpu", SHAPE, torch.float32, folder=tmp_path / "file" / "below"
    )
    assert machine.num_ranks == 1 and "not kept" in caplog.text


def test_the_folder_follows_the_xdg_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/sp-serve")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "sp-serve"
