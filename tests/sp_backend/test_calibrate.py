"""Trial steps: which are worth running, and what a planner learns from them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from random import Random

import numpy as np
import pytest

from sp_backend.calibrate import FACTORS, MOST_TRIALS, SECONDS, Trial, choose_trials, correct, corrected
from sp_backend.planner import OFF, Planner
from sp_backend.presets import preset
from sp_backend.simulate import perturbed, simulate
from sp_backend.topology import Machine
from tests.sp_backend.machines import LLAMA_70B, MHA, SMALL


@cache
def told() -> Planner:
    return Planner(preset("nic200-4"), MHA, 4)


@cache
def trials() -> tuple[Trial, ...]:
    return tuple(choose_trials(told(), longest=32768))


def measured(machine: Machine, noise: float = 0.0, seed: int = 0) -> list[float]:
    """What the trials take by the simulator."""
    random, planner, found = Random(seed), told(), []
    for trial in trials():
        plan, geometry = planner.plan(trial.variant), planner.lay_out(trial.variant, trial.batch)
        step = simulate(plan, machine, planner.shape, geometry, dense=True).step_seconds
        found.append(step * random.gauss(1.0, noise))
    return found


def errors(planner: Planner, machine: Machine) -> list[float]:
    """Of predictions for sizes that are not among the trials, each under the plans that may be chosen."""
    found = []
    for size in ((100, 0), (300, 0), (900, 700), (3000, 0), (500, 30_000), (20_000, 1000)):
        for variant in planner.winners:
            step = simulate(planner.plan(variant), machine, MHA, planner.lay_out(variant, [size]), dense=True)
            found.append(abs(float(planner.step_seconds(variant, [[size]])[0]) / step.step_seconds - 1))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_trials_on_a_machine_that_is_not_as_told_correct_the_predictions_for_other_steps(seed: int) -> None:
    machine = perturbed(told().machine, 0.3, seed)
    found = correct(told(), trials(), measured(machine, noise=0.02, seed=seed))
    before, after = (errors(planner, machine) for planner in (told(), told().on(found.machine)))
    assert float(np.median(after)) < 0.03 < float(np.median(before)) and max(after) < 0.15
    assert found.after < 0.03 < found.before


def test_what_the_trials_say_nothing_of_stays_as_told() -> None:
    """No message is packed for a plan that sends whole blocks; only a prior holds such a factor."""
    few = [trial for trial in trials() if trial.variant == OFF]
    took = dict(zip(trials(), measured(perturbed(told().machine, 0.3, 1)), strict=True))
    factors = correct(told(), few, [took[trial] for trial in few]).factors
    links = [factors[name] for name in ("link bandwidth", "link latency", "message_seconds", "copy_bytes")]
    assert links == pytest.approx([1.0] * 4) and factors["kernel"] != pytest.approx(1.0, abs=0.02)


def test_a_machine_that_is_as_told_stays_so_and_its_predictions_are_trusted_more() -> None:
    seconds = [float(told().step_seconds(t.variant, [t.batch])[0]) for t in trials()]
    found = correct(told(), trials(), seconds)
    assert list(found.factors.values()) == pytest.approx([1.0] * len(FACTORS))
    assert found.machine.error == 0.01 < told().machine.error
    assert str(found).startswith(f"corrected by {len(trials())} trial steps: nothing; ")


def test_one_step_that_was_disturbed_moves_nothing_much() -> None:
    machine = perturbed(told().machine, 0.3, 2)
    seconds = measured(machine)
    seconds[3] *= 5
    assert float(np.median(errors(told().on(correct(told(), trials(), seconds).machine), machine))) < 0.03


def test_predictions_that_stay_wrong_are_not_trusted() -> None:
    random = Random(0)
    wild = [s * random.choice((0.5, 1, 2)) for s in measured(told().machine)]
    assert correct(told(), trials(), wild).machine.error == 0.08


def test_a_correction_is_the_same_for_the_same_measurements_and_names_what_it_changed() -> None:
    seconds = measured(preset("nic200-4"))
    slow = [s * 1.2 for s in seconds]
    assert correct(told(), trials(), slow) == correct(told(), trials(), slow) != correct(told(), trials(), seconds)
    assert "link latency x1.2" in str(correct(told(), trials(), slow))


@pytest.mark.parametrize("shape", [LLAMA_70B, MHA, SMALL], ids=["70B", "7B", "tiny"])
@pytest.mark.parametrize("machine", ["nvlink4-4", "pcie4-2", "loopback-2"])
def test_trials_are_few_short_and_of_plans_that_may_be_chosen(machine: str, shape: object) -> None:
    planner = Planner(preset(machine), shape, preset(machine).num_ranks)  # type: ignore[arg-type]
    chosen = choose_trials(planner, longest=5000)
    seconds = [float(planner.step_seconds(t.variant, [t.batch])[0]) for t in chosen]
    assert 8 <= len(chosen) <= MOST_TRIALS and all(t.new + t.cached <= 5000 for t in chosen)
    assert {t.variant for t in chosen} <= set(planner.winners) and any(t.variant == OFF for t in chosen)
    assert len({t.variant for t in chosen}) > 1
    assert sum(seconds) <= max(SECONDS, 12.01 * min(seconds))
    assert chosen == choose_trials(planner, longest=5000)


def test_trials_are_of_sizes_at_which_the_handicap_of_sharing_leaves_a_choice() -> None:
    """What a step of 64 tokens takes is of no use where sharing pays from 1,024 on."""
    machine = preset("loopback-2")
    now, later = (Planner(machine, SMALL, 2, delay=delay) for delay in (0.0, 20e-3))
    assert now.degree_for(512, 0) == 2 > later.degree_for(512, 0) == 1 < later.degree_for(1024, 0)
    lengths = [[t.new for t in choose_trials(planner, longest=5000)] for planner in (now, later)]
    assert np.mean(lengths[1]) > 1.5 * np.mean(lengths[0]) and max(lengths[1]) > max(lengths[0])


def test_where_there_is_no_choice_there_are_no_trials() -> None:
    assert choose_trials(Planner(preset("nvlink4-4"), MHA, 1), longest=32768) == []
    assert choose_trials(Planner(preset("nvlink4-4"), MHA, 4, layout="heads"), longest=32768) == []
    assert choose_trials(told(), longest=10) == []


def test_a_planner_on_another_machine_is_one_made_for_it() -> None:
    there = replace(corrected(told().machine, [0.3] * len(FACTORS)), error=0.5)
    moved, made = told().on(there), Planner(there, MHA, 4)
    batch = [(5000, 300), (70, 0)]
    assert moved.choose(batch) == made.choose(batch) != told().choose(batch)
    assert moved.winners == made.winners
    assert there.rates.kernel.causal[0] == pytest.approx(told().machine.rates.kernel.causal[0] * np.exp(0.3))
