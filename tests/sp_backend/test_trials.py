"""Trial steps as the workers run them, and what is kept of them. tests/e2e/test_trials.py has them on real ranks."""

from __future__ import annotations

import numpy as np
import pytest

from sp_backend.calibrate import FACTORS, Trial
from sp_backend.commands import SequenceStep
from sp_backend.config import BackendConfig
from sp_backend.planner import OFF, Planner
from sp_backend.presets import preset
from sp_backend.strategies import Variant
from sp_backend.trials import has_trials, path_of, trial_step
from tests.sp_backend.machines import MHA

PAGE = 64
PLANNER = Planner(preset("nvlink4-4"), MHA, 4)


def on_ranks(variant: Variant, new: int, cached: int) -> list[SequenceStep]:
    layout = PLANNER.plan(variant).layout
    steps = [trial_step(Trial(variant, new, cached, (0.0,) * len(FACTORS)), layout, r, PAGE) for r in range(4)]
    assert all(step.release == [0] and step.groups[0].plan == str(variant) for step in steps)
    return [step.groups[0].sequences[0] for step in steps]


@pytest.mark.parametrize("variant", [Variant("ring_pass_kv"), Variant("token_ring", degree=2), OFF], ids=str)
@pytest.mark.parametrize(("new", "cached"), [(16, 0), (300, 2048), (4096, 16384)])
def test_a_trial_is_the_batch_that_is_predicted(variant: Variant, new: int, cached: int) -> None:
    """Its new and cached tokens lie on the ranks as the planner lays them out; one rank draws the next token."""
    steps = on_ranks(variant, new, cached)
    layout = PLANNER.plan(variant).layout
    owners = np.frombuffer(steps[0].page_owners, np.uint8)
    assert len(owners) == -(-(cached + new) // PAGE)
    for rank, step in enumerate(steps):
        assert (step.num_new, step.start, step.page_owners) == (new, cached, steps[0].page_owners)
        assert len(step.pages) == 4 * int((owners == rank).sum())
        if variant != OFF:
            rows = Planner(preset("nvlink4-4"), MHA, 4, page_size=PAGE).lay_out(variant, [(new, cached)]).rows[0]
            assert len(step.tokens) == 4 * sum(rows[c] for c in layout.q_of(rank))
            history = int((owners[: cached // PAGE] == rank).sum()) * PAGE
            assert abs(history - rows[layout.history_of(rank)]) < PAGE
    assert sum(len(step.tokens) for step in steps) == 4 * new
    drawing = [rank for rank, step in enumerate(steps) if step.sampling is not None]
    assert drawing == [owners[-1]]


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, True),
        ({"sp_size": 1}, False),
        ({"strategy": "token_ring"}, False),
        ({"layout": "heads"}, False),
        ({"topology": "nvlink4-4"}, False),
    ],
    ids=str,
)
def test_only_a_choice_on_a_machine_that_nobody_described_has_trials(changes: dict[str, object], wanted: bool) -> None:
    config = {"model_path": "", "dtype": "float32", "context_length": 1, "sp_size": 4, "strategy": "auto"} | changes
    assert has_trials(BackendConfig(**config)) == wanted  # type: ignore[arg-type]


def test_what_was_learned_is_kept_apart_for_another_machine_or_page_size() -> None:
    def path(machine: str, page_size: int = 64) -> str:
        config = BackendConfig(model_path="", dtype="float32", context_length=1, sp_size=4, page_size=page_size)
        return path_of(config, preset(machine), MHA).name

    assert path("nvlink4-4") == path("nvlink4-4")
    assert len({path("nvlink4-4"), path("pcie4-4"), path("nvlink4-4", 16)}) == 3
