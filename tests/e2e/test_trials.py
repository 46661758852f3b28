"""Trial steps on real workers: all ranks learn the same, a later start reads it, and the model still computes right."""

from __future__ import annotations

from pathlib import Path

import pytest

from scheduler.config import SchedulerConfig
from scheduler.controller import Controller
from scheduler.request import GenerateRequest, Output
from sp_backend import trials
from sp_backend.catalog import planner_for
from sp_backend.commands import Ready
from sp_backend.config import BackendConfig
from sp_backend.models.config import ModelConfig
from sp_backend.presets import load_machine
from sp_backend.topology import Machine
from tests.checkpoints import make_checkpoint, oracle_greedy
from tests.e2e import rank_workers
from tests.e2e.rank_workers import GREEDY, RankWorkers
from tests.ranks import run_on_ranks

PROMPT = [3 + i * 7 % 50 for i in range(150)]
TOLD = load_machine("loopback-2")


def learn(rank: int, size: int, file: str, trusted: float) -> Ready:
    worker = rank_workers._worker["it"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials, "TRUSTED", trusted)  # a test machine may be busy
        worker.learn(Path(file))
    return worker.ready()


def recall(rank: int, size: int, file: str) -> Machine | None:
    return trials.recall(Path(file), size)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3")


@pytest.mark.parametrize("trusted", [1e9, -1.0], ids=["believed", "not believed"])
def test_workers_learn_their_machine_and_then_serve(model: Path, tmp_path: Path, trusted: float) -> None:
    """On two ranks. Corrections that leave predictions far off are neither used nor kept."""
    config = BackendConfig(
        model_path=str(model),
        dtype="float32",
        context_length=4096,
        sp_size=2,
        strategy="auto",
        page_size=16,
        num_pages=300,
    )
    workers, file = RankWorkers(config, TOLD), tmp_path / "corrected.json"
    ready, other = run_on_ranks(2, learn, str(file), trusted)
    assert ready.machine is not None and ready.machine == other.machine and ready.plan_digests == other.plan_digests
    if trusted > 0:
        assert ready.machine.name.startswith("loopback-2, corrected by ") and ready.machine.rates != TOLD.rates
        assert run_on_ranks(2, recall, str(file)) == [ready.machine] * 2
    else:
        assert ready.machine == TOLD
        assert run_on_ranks(2, recall, str(file)) == [None] * 2

    outputs: list[Output] = []
    planner = planner_for(config, ModelConfig.load(model), ready.machine)
    controller = Controller(SchedulerConfig(), config, workers, 300, outputs.extend, planner=planner)
    controller.submit(GenerateRequest("one", PROMPT, 4, GREEDY))
    while controller.step():
        pass
    assert [t.token for output in outputs for t in output.tokens] == oracle_greedy(model, PROMPT, 4)


def test_a_file_that_is_no_use_is_as_good_as_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("{")
    assert run_on_ranks(2, recall, str(tmp_path / "file")) == [None] * 2
