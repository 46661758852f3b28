"""The files that explain writes, each by a function that returns what is in it: a comparison as data, the plan shown as
a simulated schedule for Perfetto, a plot over lengths. Pure: no torch; the plot alone needs matplotlib.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from sp_backend.comparison import Comparison, parts
from sp_backend.layout import Block
from sp_backend.plan import Attend, Plan, Transfer
from sp_backend.planner import Candidate
from sp_backend.report import busiest_link, milliseconds, why
from sp_backend.simulate import simulate
from sp_backend.trace import chrome_trace

_SHORTEST: Final = 512  # tokens of a plot; the longest is four times what is asked about
_BEYOND: Final = 4
_MOST_RATIO: Final = 3  # of a plot


def write_json(comparison: Comparison, file: Path) -> str:
    file.write_bytes(msgspec.json.format(msgspec.json.encode(as_data(comparison))) + b"\n")
    return "every candidate and the plan, as data"


def write_timeline(comparison: Comparison, file: Path) -> str:
    """One layer under the plan shown, event by event; its other work too where the model's sizes are given."""
    shape, shown = comparison.question.shape, comparison.shown
    machine = comparison.machine(shown)
    simulation = simulate(shown.plan, machine, shape, shown.geometry, dense=shape.dense_flops > 0)
    title = f"{shown.variant} on {machine.name}"
    file.write_bytes(msgspec.json.encode(chrome_trace(simulation, machine.num_ranks, title)))
    return f"one layer simulated event by event, {milliseconds(simulation.seconds)}; open it in ui.perfetto.dev"


def write_plot(comparison: Comparison, file: Path) -> str:
    """Predicted time against new tokens, and its ratio to the best; one line a strategy, its best variant each time."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    asked = sum(new for new, _ in comparison.question.batch)
    longest = max(_BEYOND * asked, 2 * _SHORTEST)
    lengths = [_SHORTEST * 2**i for i in range(1 + int(math.log2(longest / _SHORTEST)))]
    found = comparison.over_lengths([n / asked for n in lengths])
    best = np.min(list(found.values()), axis=0)
    figure, (upper, lower) = pyplot.subplots(2, 1, figsize=(8, 8), sharex=True)
    for i, (name, seconds) in enumerate(found.items()):
        style = {"color": f"C{i % 10}", "linestyle": "-" if i < 10 else "--", "marker": ".", "label": name}
        upper.plot(lengths, seconds * 1e3, **style)
        lower.plot(lengths, seconds / best, **style)
    what = "a forward pass" if comparison.question.whole_step else "a layer's attention"
    upper.set(xscale="log", yscale="log", ylabel=f"predicted time of {what} (ms)")
    upper.set_title(f"{comparison.question.machine.name}: each strategy at its best degree and options", fontsize=10)
    lower.set(xlabel="new tokens", ylabel="time ÷ the best", ylim=(0.95, _MOST_RATIO))
    lower.set_xticks(lengths, [str(n) if n < 1024 else f"{n // 1024}k" for n in lengths])
    lower.minorticks_off()
    for axes in (upper, lower):
        axes.axvline(asked, color="grey", linewidth=0.8)
        axes.grid(alpha=0.3)
    upper.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    pyplot.close(figure)
    return "predicted time against new tokens"


def as_data(comparison: Comparison) -> dict[str, Any]:
    """Seconds and bytes; the keys are described in docs/planning.md."""
    question, shape = comparison.question, comparison.question.shape
    return {
        "question": {
            "topology": question.machine.name,
            "sp_size": question.machine.num_ranks,
            "heads": shape.num_heads,
            "kv_heads": shape.num_kv_heads,
            "head_dim": shape.head_dim,
            "layers": shape.num_layers,
            "dense_params": shape.dense_flops / 2,
            "itemsize": shape.itemsize,
            "layout": question.layout,
            "mask": "causal" if question.causal else "full",
            "page_size": question.page_size,
            "new_tokens": [new for new, _ in question.batch],
            "cached_tokens": [cached for _, cached in question.batch],
        },
        "ranked_by": "step_seconds" if question.whole_step else "attention_seconds",
        "why": why(comparison),
        "bounded": [
            {"name": str(b.variant), "at_least_seconds": b.seconds, "slow": b.slow} for b in comparison.bounded
        ],
        "degrees": [
            {"degree": degree, "name": str(variant), "seconds": seconds, "at_least": bounded}
            for degree, variant, seconds, bounded in comparison.of_each_degree()
        ],
        "candidates": [_row(comparison, c) for c in comparison.ranked],
        "plan": _plan(comparison.shown.plan),
    }


def _row(comparison: Comparison, candidate: Candidate) -> dict[str, Any]:
    cost, pair = candidate.cost, busiest_link(candidate)
    spent = parts(comparison, candidate)
    return {
        "name": str(candidate.variant),
        "strategy": candidate.variant.strategy,
        "options": candidate.variant.options.given(),
        "degree": candidate.degree,
        "ratio": comparison.ratio(candidate),
        "attention_seconds": cost.seconds,
        "projection_seconds": comparison.projection_seconds(candidate),
        "step_seconds": cost.step_seconds,
        "compute_seconds": spent.compute,
        "exposed_seconds": cost.exposed,
        "hidden_seconds": cost.hidden,
        "overhead_seconds": spent.overhead,
        "busiest_resource": spent.resource or None,
        "busiest_resource_seconds": spent.link,
        "busiest_link": _arrow(pair) if pair else None,
        "total_bytes": cost.total_bytes,
        "link_bytes": {_arrow(link): num_bytes for link, num_bytes in sorted(cost.link_bytes.items())},
        "rounds": [{"compute": r.compute, "transfer": r.transfer, "wait": r.wait} for r in cost.rounds],
    }


def _plan(plan: Plan) -> dict[str, Any]:
    return {
        "name": plan.name,
        "digest": plan.digest,
        "rounds": [
            {"transfers": list(map(_named, r.transfers)), "attends": list(map(_named, r.attends))} for r in plan.rounds
        ],
    }


def _arrow(link: tuple[int, int]) -> str:
    return f"{link[0]}>{link[1]}"


def _named(instruction: Transfer | Attend) -> dict[str, Any]:
    """An instruction's fields by name, and those of its blocks."""
    fields = instruction._asdict()
    return {name: value._asdict() if isinstance(value, Block) else value for name, value in fields.items()}
