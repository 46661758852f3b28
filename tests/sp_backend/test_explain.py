"""`python -m sp_backend.explain`: the ranking, its reasons, and what it writes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from sp_backend import explain
from sp_backend.comparison import Comparison, Question, parts
from sp_backend.cost import PlanCost
from sp_backend.geometry import predicted_bytes
from sp_backend.placement import lay_out
from sp_backend.planner import OFF
from sp_backend.presets import KINDS, load_machine
from sp_backend.report import as_text, binds, milliseconds, plan_table, size, why
from sp_backend.shape import ModelShape
from sp_backend.simulate import simulate
from sp_backend.strategies import STRATEGIES, Options, Variant, plan_for
from sp_backend.topology import Machine
from sp_backend.written import as_data
from tests.checkpoints import make_checkpoint

GQA = ModelShape(num_heads=64, num_kv_heads=8, head_dim=128)
ASKED = ["--topology", "nvlink4-4", "--heads", "64", "--kv-heads", "8"]


def compare(topology: str = "nvlink4-4", new: int = 8192, cached: int = 0, **more: Any) -> Comparison:
    return Comparison(Question(load_machine(topology), more.pop("shape", GQA), [(new, cached)], **more))


# The ranking


def test_candidates_are_ranked_by_predicted_time_and_off_is_among_them() -> None:
    comparison = compare()
    seconds = [c.cost.seconds for c in comparison.ranked]
    assert seconds == sorted(seconds)
    assert OFF in [c.variant for c in comparison.ranked]
    assert comparison.ratio(comparison.best) == 1


def test_with_the_models_sizes_a_whole_step_is_ranked() -> None:
    shape = ModelShape(64, 8, 128, num_layers=32, dense_flops=2 * 7e9)
    comparison = compare(shape=shape, whole_step=True)
    seconds = [c.cost.step_seconds for c in comparison.ranked]
    assert seconds == sorted(seconds)
    assert "whole step" in as_text(comparison)


def test_each_strategy_is_shown_once_at_its_best() -> None:
    comparison = compare()
    shown = [c.variant.strategy for _, c in comparison.of_each_strategy()]
    assert len(shown) == len(set(shown))
    assert set(shown) == {name for name, row in STRATEGIES.items() if row.layout == "tokens"} | {OFF.strategy}


def test_bytes_are_those_that_the_wires_carry() -> None:
    comparison = compare(cached=1000)
    for c, row in zip(comparison.ranked, as_data(comparison)["candidates"], strict=True):
        rounds = predicted_bytes(c.plan, c.geometry, GQA.head_dim, GQA.itemsize)
        assert row["total_bytes"] == sum(sum(r.values()) for r in rounds)
        assert row["link_bytes"].get(row["busiest_link"], 0) == max(row["link_bytes"].values(), default=0)


def test_compute_exposed_communication_and_overhead_are_all_of_the_time() -> None:
    comparison = compare(new=2048)
    for c in comparison.ranked:
        spent = parts(comparison, c)
        assert spent.compute + spent.exposed + spent.overhead == pytest.approx(c.cost.seconds)
        assert min(spent.compute, spent.exposed, spent.overhead) >= 0


@pytest.mark.parametrize("variant", [Variant("ring_pass_kv", degree=2), Variant("ulysses", degree=4)], ids=str)
def test_a_prompt_that_is_alone_costs_what_its_group_of_ranks_does(variant: Variant) -> None:
    """The others have nothing to do: the plan of all ranks takes as long and sends as much."""
    machine, batch = load_machine("2xpcie4-4/nic200-shared"), [(3000, 500)]
    comparison = Comparison(Question(machine, GQA, batch, forced=variant))
    whole = plan_for(variant, num_ranks=8, num_heads=64, num_kv_heads=8)
    cost = PlanCost(whole, machine, GQA).cost(lay_out(whole.layout, batch, 64))
    assert comparison.shown.plan.layout.num_ranks == variant.degree
    assert comparison.shown.cost.seconds == pytest.approx(cost.seconds)
    assert comparison.shown.cost.step_seconds == pytest.approx(cost.step_seconds)
    assert {pair: n for pair, n in cost.link_bytes.items() if n} == comparison.shown.cost.link_bytes


def test_of_many_ranks_only_default_options_are_costed_unless_all_is_asked_for() -> None:
    question = Question(load_machine("4xnvlink4-8/nic400"), GQA, [(8192, 0)])
    named = [str(v) for v in question.candidates()]
    assert "hybrid" in named and "ring_pass_kv@8" in named and "hybrid(ulysses_degree=2)" not in named
    everything = replace(question, every_option=True)
    assert everything.candidates() == everything.variants() and len(named) < len(everything.variants())


def test_of_many_ranks_what_cannot_win_and_what_is_too_large_is_only_bounded() -> None:
    question = Question(load_machine("8xnvlink4-8/nic400"), GQA, [(131072, 0)])
    comparison = Comparison(question)
    costed, bounded = {c.variant for c in comparison.ranked}, {b.variant: b for b in comparison.bounded}
    assert costed | {*bounded} == {*question.candidates()} and not costed & {*bounded}
    best = comparison.best.cost.seconds
    for b in comparison.bounded:
        assert b.slow == (b.variant in (Variant("ulysses"), Variant("hamilton"))) == (b.seconds <= best)
    told = as_text(comparison)
    beaten = [b.seconds for b in bounded.values() if not b.slow]
    least = milliseconds(min(beaten))
    assert f"{len(beaten)} more are slower even if sending were free (>=): they take at least {least}" in told
    assert "not costed, as so large a plan takes seconds" in told and " wins of those costed. " in told


def test_strategies_that_are_only_bounded_are_in_the_ranking_with_their_least() -> None:
    comparison = Comparison(Question(load_machine("nic400-32"), GQA, [(8192, 0)]))
    lines = as_text(comparison).split("\n")
    assert comparison.beaten() and not {b.variant.strategy for b in comparison.beaten()} & {
        c.variant.strategy for c in comparison.ranked
    }
    for b in comparison.beaten():
        assert b.seconds == min(x.seconds for x in comparison.bounded if x.variant.strategy == b.variant.strategy)
        row = next(line for line in lines if f"  {b.variant} " in line).split()
        assert row[0] == "-" and row[2] == f">={b.seconds * 1e3:.3f}"


@pytest.mark.parametrize("topology", ["nvlink4-8", "nic400-32"])
def test_what_more_ranks_for_a_prompt_gain_is_told_off_included(topology: str) -> None:
    comparison = compare(topology, new=65536)
    found = comparison.of_each_degree()
    ranks = comparison.question.machine.num_ranks
    assert [degree for degree, *_ in found] == [d for d in range(1, ranks + 1) if ranks % d == 0]
    assert found[0][1] == OFF and not found[0][3]
    for degree, variant, seconds, bounded in found:
        same = [c for c in comparison.ranked if c.degree == degree]
        least = [
            b.seconds for b in comparison.bounded if comparison.question.degree(b.variant) == degree and not b.slow
        ]
        assert seconds == min([*map(comparison.seconds, same), *least])
        assert bounded == (variant not in [c.variant for c in same])
    assert f"{found[0][2] / found[-1][2]:.2f}x" in as_text(comparison)


def test_a_strategy_that_is_asked_for_is_shown_even_if_it_is_no_candidate() -> None:
    asked = Variant("hamilton", Options(num_rings=1))
    comparison = compare(forced=asked)
    assert comparison.shown.variant == asked != comparison.best.variant
    assert asked in [c.variant for _, c in comparison.of_each_strategy()]
    assert as_data(comparison)["plan"]["name"] == str(asked)


# Layout heads


def heads(new: int) -> Comparison:
    shape = replace(GQA, kv_flops=4.0 * 8192 * GQA.num_kv_heads * GQA.head_dim)
    return compare("nvlink4-8", new, layout="heads", shape=shape)


@pytest.mark.parametrize(("new", "redundant"), [(64, True), (4096, False)])
def test_layout_heads_has_exchanged_and_redundant_kv(new: int, redundant: bool) -> None:
    """What redundant KV saves in messages it loses in projections."""
    comparison = heads(new)
    best, other = comparison.ranked
    assert (best.variant.options.redundant_kv, other.variant.options.redundant_kv) == (redundant, not redundant)
    sent = {c.variant.options.redundant_kv: c.cost.total_bytes for c in comparison.ranked}
    assert sent[True] == 0 < sent[False]
    told = as_text(comparison)
    assert "sharded_q(redundant_kv)" in told and " K/V " in told
    assert f"The next plan, {other.variant}, takes" in told


def test_projections_of_layout_heads_are_counted_and_repeated_under_redundant_kv() -> None:
    comparison = heads(4096)
    found = {c.variant.options.redundant_kv: comparison.projection_seconds(c) for c in comparison.ranked}
    shape, rates = comparison.question.shape, comparison.question.machine.rates
    assert found[True] == pytest.approx(4096 * shape.kv_flops / rates.dense_flops)
    assert found[True] == pytest.approx(8 * found[False])
    for c in comparison.ranked:
        assert comparison.seconds(c) == c.cost.seconds + found[c.variant.options.redundant_kv]


def test_layout_heads_takes_the_hidden_size_from_the_heads(capsys: pytest.CaptureFixture[str]) -> None:
    asked = [*"--topology nvlink4-8 --heads 64 --kv-heads 8 --sp-layout heads --new-tokens 4096".split()]
    explain.main(asked)
    told = capsys.readouterr().out
    explain.main([*asked, "--hidden-size", "8192"])
    assert capsys.readouterr().out == told
    explain.main([*asked, "--strategy", "sharded_q", "--sp-redundant-kv"])
    assert "sharded_q(redundant_kv): layout heads" in capsys.readouterr().out


# Why the first one wins


@pytest.mark.parametrize(
    ("topology", "new", "heads", "reason"),
    [
        ("nvlink4-4", 131072, (64, 8), "Compute binds"),
        ("nic200-4", 8192, (32, 32), "A link binds"),
        ("nic400-4", 512, (2, 1), "Latency binds"),
    ],
)
def test_the_reason_is_what_binds(topology: str, new: int, heads: tuple[int, int], reason: str) -> None:
    comparison = compare(topology, new, shape=ModelShape(*heads, 128), forced=Variant("ring_pass_kv"))
    assert binds(comparison, comparison.shown).startswith(reason)


def test_a_short_prompt_stays_on_one_rank_because_the_others_cost_rounds_and_messages() -> None:
    told = why(compare(new=64))
    assert told.startswith("local wins. Nothing is sent: ")
    assert re.search(r"The next strategy, .*, takes 1\.\d\dx: its rounds, messages, packing and merging take", told)


def test_of_a_step_dense_work_may_be_what_the_next_one_loses_by() -> None:
    shape = ModelShape(8, 8, 128, num_layers=2, dense_flops=2e12)
    told = why(compare("nvlink4-1", 4096, shape=shape, whole_step=True))
    assert re.search(r"^local wins.* Attention is \d% of the step's ", told)


def test_the_reason_names_what_no_prediction_tells_apart() -> None:
    comparison = compare(new=131072)
    assert "which no prediction tells apart: " in why(comparison)


# What is written


def test_a_large_plan_is_cut_with_a_note() -> None:
    plan = plan_for("ring_pass_kv", num_ranks=16, num_heads=16, num_kv_heads=8)
    cut = plan_table(plan)
    assert max(map(len, cut.split("\n"))) <= 200
    assert cut.endswith("(cut: --table prints all of 16 ranks x 16 rounds)")
    assert plan_table(plan, whole=True) == plan.table()


def test_the_text_has_the_ranking_the_reason_and_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert explain.main([*ASKED, "--new-tokens", "8192", "--strategy", "ring_pass_kv_up"]) == 0
    asked, ranking, reason, degrees, table = capsys.readouterr().out.strip().split("\n\n")
    assert asked.startswith("4 ranks of nvlink4-4; 64:8 heads of 128") and "8,192 new and 0 cached" in asked
    assert "ratio  busiest link" in ranking and "ring_pass_kv" in ranking
    assert " wins. " in reason
    assert [line.split()[0] for line in degrees.split("\n")[1:]] == ["ranks", "1", "2", "4"]
    assert table == plan_for("ring_pass_kv_up", num_ranks=4, num_heads=64, num_kv_heads=8).table()


def test_a_plan_may_be_asked_for_as_the_ranking_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    explain.main([*ASKED, "--new-tokens", "8192", "--strategy", "hybrid(ulysses_degree=2,ring_inside)"])
    by_name = capsys.readouterr().out
    flags = ["--strategy", "hybrid", "--sp-ulysses-degree", "2", "--sp-ring-inside"]
    explain.main([*ASKED, "--new-tokens", "8192", *flags])
    assert capsys.readouterr().out == by_name


def test_strategies_of_the_servers_command_line_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    asked = [*ASKED, "--new-tokens", "8192"]
    for name, same in (("off", ["--strategy", "local"]), ("auto", [])):
        explain.main([*asked, "--sp-strategy", name])
        told = capsys.readouterr().out
        explain.main([*asked, *same])
        assert capsys.readouterr().out == told


def test_json_has_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    batch = ["--new-tokens", "4096", "300", "--cached-tokens", "0", "9000"]
    explain.main([*ASKED, *batch, "--json", str(tmp_path / "out.json")])
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["question"]["new_tokens"] == [4096, 300] and data["question"]["cached_tokens"] == [0, 9000]
    assert data["ranked_by"] == "attention_seconds"
    best = data["candidates"][0]
    assert data["why"] in capsys.readouterr().out and data["why"].startswith(f"{best['name']} wins")
    assert [d["degree"] for d in data["degrees"]] == [1, 2, 4] and not any(d["at_least"] for d in data["degrees"])
    assert best["ratio"] == 1 and best["name"] == data["plan"]["name"]
    assert len(best["rounds"]) == len(data["plan"]["rounds"]) + 1  # and what remains when those are over
    block = data["plan"]["rounds"][0]["attends"][0]["q"]
    assert block == {"operand": "Q", "chunk": 0, "heads": block["heads"], "piece": [0, 1]}


def test_the_timeline_is_the_simulated_schedule(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    explain.main([*ASKED, "--new-tokens", "8192", "--strategy", "token_ring", "--timeline", str(file)])
    events = json.loads(file.read_text())["traceEvents"]
    comparison = compare(forced=Variant("token_ring"))
    shown, machine = comparison.shown, comparison.question.machine
    simulation = simulate(shown.plan, machine, GQA, shown.geometry)

    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == [f"rank {r}" for r in range(4)]
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    complete = [e for e in events if e["ph"] == "X"]
    assert max(e["ts"] + e["dur"] for e in complete) == pytest.approx(simulation.seconds * 1e6)
    assert len(complete) == len(simulation.timeline) + len([e for e in simulation.timeline if e.kind == "send"])
    assert {name.split()[0] for name in threads.values()} == {"compute", "wait", "send", "receive"}
    for thread in threads:  # viewers drop events that overlap on a row
        row = sorted((e["ts"], e["dur"]) for e in complete if (e["pid"], e["tid"]) == thread)
        assert row and all(a + dur <= b + 1e-6 for (a, dur), (b, _) in pairwise(row))
    received = [e for e in complete if threads[e["pid"], e["tid"]].startswith("receive")]
    assert received and all(e["args"]["to"] == e["pid"] for e in received)


def test_a_plot_has_a_line_for_each_strategy(tmp_path: Path) -> None:
    explain.main([*ASKED, "--new-tokens", "4096", "--plot", str(tmp_path / "plot.png")])
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    comparison = compare(new=4096)
    at_once = comparison.over_lengths([0.5, 1.0])
    for _, c in comparison.of_each_strategy():
        assert at_once[c.variant.strategy][1] == pytest.approx(c.cost.seconds)


def test_a_plot_of_many_ranks_has_strategies_that_cannot_win_at_the_length_asked_about() -> None:
    comparison = compare("nic400-18", 64)
    found = comparison.over_lengths([1.0, 100.0])
    assert {*found} == {v.strategy for v in comparison.question.candidates()}
    assert {*found} > {c.variant.strategy for c in comparison.ranked}


def test_long_work_is_shown_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [*ASKED, "--new-tokens", "512"]
    explain.main([*asked, "--all"])
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    explain.main(asked)
    assert capsys.readouterr().err == ""
    explain.main([*asked, "--all"])
    assert re.search(r"0/21 .*plan/s, all_gather_kv\]", capsys.readouterr().err)


def test_topologies_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert explain.main(["--list-topologies"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n{kind} " in printed for kind in KINDS)
    assert "350 GB/s" in printed and "2xnvlink4-8/nic400" in printed


def test_sizes_come_from_a_models_folder_and_flags_override_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_checkpoint(tmp_path / "model", "qwen2")
    config = json.loads((folder / "config.json").read_text())
    explain.main(["--topology", "loopback-2", "--new-tokens", "512", "--model", str(folder)])
    heads = f"{config['num_attention_heads']}:{config['num_key_value_heads']} heads of "
    printed = capsys.readouterr().out
    assert heads in printed and "whole step" in printed
    explain.main(["--topology", "loopback-2", "--new-tokens", "512", "--model", str(folder), "--head-dim", "64"])
    assert f"{heads}64" in capsys.readouterr().out


def test_windows_of_a_model_are_said_not_to_be_costed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_checkpoint(tmp_path / "model", "mistral")
    explain.main(["--topology", "loopback-2", "--new-tokens", "64", "--model", str(folder)])
    assert "has sliding windows; its layers are costed as full attention" in capsys.readouterr().err


def test_a_topology_may_be_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = load_machine("pcie4-4")
    file = tmp_path / "mine.json"
    file.write_text(Machine("mine", machine.topology, machine.rates).to_json())
    explain.main(["--topology", str(file), "--sp-size", "2", "--heads", "8", "--new-tokens", "512"])
    assert capsys.readouterr().out.startswith("2 ranks of mine; 8:8 heads")


# Refusals


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--heads 8 --new-tokens 5", "--topology is missing"),
        ("--topology nvlink4-4 --new-tokens 5", "--heads is missing"),
        ("--topology nvlink4-4 --heads 8", "--new-tokens is missing"),
        ("--topology warp-4 --heads 8 --new-tokens 5", "--topology warp-4: unknown topology"),
        ("--topology nvlink4-4 --sp-size 9 --heads 8 --new-tokens 5", "--topology nvlink4-4: a topology of 4 ranks"),
        ("--topology nvlink4-4 --sp-size 0 --heads 8 --new-tokens 5", "--sp-size 0: at least 1"),
        ("--topology nvlink4-4 --heads 8 --kv-heads 3 --new-tokens 5", "--kv-heads 3 does not divide --heads 8"),
        ("--topology nvlink4-4 --heads 0 --new-tokens 5", "--heads 0: at least 1"),
        ("--topology nvlink4-4 --heads 8 --new-tokens 0", "--new-tokens 0: at least 1"),
        ("--topology nvlink4-4 --heads 8 --new-tokens 5 --cached-tokens -1", "--cached-tokens -1: at least 0"),
        ("--topology nvlink4-4 --heads 8 --new-tokens 5 6 --cached-tokens 1", "one for each prompt"),
        ("--topology nvlink4-4 --heads 8 --new-tokens 5 --dense-params 7e9", "--dense-params needs --layers"),
        ("--topology nvlink4-4 --heads 8 --new-tokens 5 --strategy spiral", "--strategy spiral: not a strategy"),
        ("--topology nvlink4-4 --heads 8 --new-tokens 5 --sp-num-rings 2", "--sp-num-rings needs a --strategy"),
        ("--topology nvlink4-4 --heads 8 --new-tokens 5 --strategy hamilton --sp-num-rings 9", "--sp-num-rings"),
        ("--topology nvlink4-4 --heads 8 --new-tokens 5 --strategy ulysses --sp-window-size 2", "--sp-window-size"),
        ("--topology nvlink4-4 --heads 8 --new-tokens 5 --strategy ulysses --sp-degree 3", "--sp-degree 3: 4 ranks"),
        ("--topology nvlink4-4 --heads 8 --new-tokens 5 --model nowhere", "--model: nowhere: no such folder"),
        ("--topology nvlink4-4 --heads 8 --new-tokens 5 --json nowhere/x", "--json nowhere/x: cannot be written"),
        (
            "--topology nvlink4-4 --heads 6 --new-tokens 5 --sp-layout heads",
            "6 query heads cannot be divided over 4",
        ),
        (
            "--topology nvlink4-4 --heads 8 --new-tokens 5 --sp-layout heads --layers 2",
            "--dense-params 0: layout heads needs at least the projections to keys and values, 4.1943e+06",
        ),
        ("--topology nvlink4-4 --heads 8 --new-tokens 5 --sp-redundant-kv", "--sp-redundant-kv needs a --strategy"),
        ("--topology nvlink4-4 --heads 8 --new-tokens 99999999999", "--new-tokens 99999999999: at most 1,000,000,000"),
        ("--topology nvlink4-4 --heads 20000 --new-tokens 5", "--heads 20000: at most 10,000 is possible"),
        ("--topology nvlink4-100000 --heads 8 --new-tokens 5", "has 100000 ranks; a preset has at most 1024"),
        ("--topology nowhere.json --heads 8 --new-tokens 5", "--topology nowhere.json: no such file"),
        ("--topology nvlink4-4 --heads 8 --new-tokens five", "--new-tokens: invalid int value"),
    ],
)
def test_bad_input_is_refused_in_one_line_that_names_the_flag(
    flags: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        explain.main(flags.split())
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert told in error and error.count("\n") == 1


def test_a_plot_without_matplotlib_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        explain.main([*ASKED, "--new-tokens", "64", "--plot", str(tmp_path / "plot.png")])
    assert "--plot needs matplotlib: pip install matplotlib" in capsys.readouterr().err


def test_neither_torch_nor_matplotlib_is_imported() -> None:
    flags = [*ASKED, "--new-tokens", "512"]
    code = f"""
import sys
from sp_backend.explain import main
main({flags})
assert not {{"torch", "matplotlib"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(("number", "text"), [(0, "0 B"), (999, "999 B"), (67.1e6, "67.1 MB"), (2.145e12, "2.15 TB")])
def test_bytes_read_well(number: float, text: str) -> None:
    assert size(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0 ms"), (12e-6, "0.012 ms"), (0.0015, "1.50 ms"), (0.1234, "123 ms"), (12.3, "12,300 ms")],
)
def test_times_read_well(seconds: float, text: str) -> None:
    assert milliseconds(seconds) == text
