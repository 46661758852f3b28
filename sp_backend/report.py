"""A comparison told: the ranking, why the first candidate wins, and the plan. Pure: no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from sp_backend.comparison import Comparison, Question, parts
from sp_backend.plan import Plan
from sp_backend.planner import HIDDEN, OFF, TIE, Candidate

_MOST_COLUMNS: Final = 200  # of a plan's table, unless all is asked for
_MOST_LINES: Final = 40


def why(comparison: Comparison) -> str:
    """In a few sentences: what binds the best candidate, and what the next strategy loses by."""
    best, question = comparison.best, comparison.question
    among = " of those costed" if any(b.slow for b in comparison.bounded) else ""
    told = f"{best.variant} wins{among}. {binds(comparison, best)}"
    if question.whole_step:
        share = question.shape.num_layers * best.cost.seconds / best.cost.step_seconds
        told += f" Attention is {share:.0%} of the step's {milliseconds(best.cost.step_seconds)}."
    others = comparison.rivals()
    equal = [str(c.variant) for c in others if comparison.ratio(c) < 1 + TIE]
    if equal:
        return f"{told} Within {TIE:.0%} of it, which no prediction tells apart: {', '.join(equal)}."
    if others:
        what = "plan" if others[0].variant.strategy == best.variant.strategy else "strategy"
        told += f" The next {what}, {others[0].variant}, takes {comparison.ratio(others[0]):.2f}x: "
        told += f"{_loss(comparison, others[0])}."
    return told


def binds(comparison: Comparison, candidate: Candidate) -> str:
    """What a candidate's attention waits for most: compute, a link, or latency."""
    cost, total = candidate.cost, milliseconds(candidate.cost.seconds)
    spent = parts(comparison, candidate)
    compute, link = milliseconds(spent.compute), milliseconds(spent.link)
    if not cost.link_bytes:
        return f"Nothing is sent: {total}, of which compute is {compute}."
    sent = f"{size(cost.resource_bytes[spent.resource])} through {spent.resource}, the busiest part of the way"
    most = max(spent.compute, spent.link, spent.fixed)
    if most == spent.compute:
        hides = "hides behind it" if spent.exposed < HIDDEN * cost.seconds else "does not all hide behind it"
        rest = f"exposed are {milliseconds(spent.exposed)}"
        if spent.overhead >= HIDDEN * cost.seconds:
            rest += f", and rounds, messages, packing and merging take {milliseconds(spent.overhead)}"
        return f"Compute binds: {compute} of {total}. Communication ({sent}: {link}) {hides}; {rest}."
    if most == spent.link:
        rate = size(comparison.machine(candidate).topology.resources[spent.resource])
        return f"A link binds: {sent}, take {link} of {total} at {rate}/s."
    fixed = f"{len(candidate.plan.rounds)} rounds and their messages cost {milliseconds(spent.fixed)} of {total}"
    return f"Latency binds: {fixed} at any bandwidth; {sent}, take {link}."


def _loss(comparison: Comparison, other: Candidate) -> str:
    """The part of the time by which another candidate falls behind the best most."""
    best, question = comparison.best, comparison.question
    mine, theirs = (parts(comparison, c) for c in (best, other))
    layers = question.shape.num_layers if question.whole_step else 1
    lost = {
        "its kernel calls take": layers * (theirs.compute - mine.compute),
        "it exposes": layers * (theirs.exposed - mine.exposed),
        "its rounds, messages, packing and merging take": layers * (theirs.overhead - mine.overhead),
    }
    if question.whole_step:
        dense = [c.cost.step_seconds - layers * c.cost.seconds for c in (best, other)]
        lost["its dense work takes"] = dense[1] - dense[0]
    else:
        projections = [comparison.projection_seconds(c) for c in (best, other)]
        lost["its projections to keys and values take"] = projections[1] - projections[0]
    most = max(lost, key=lost.__getitem__)
    more = f"{most} {milliseconds(lost[most])} more"
    if most != "it exposes":
        return more
    return (
        f"{more} communication (busiest part of the way: {milliseconds(theirs.link)} against {milliseconds(mine.link)})"
    )


def as_text(comparison: Comparison, whole_plan: bool = False) -> str:
    told = [_asked(comparison.question), _ranking(comparison), why(comparison)]
    if comparison.question.layout == "tokens" and comparison.question.machine.num_ranks > 1:
        told.append(_degrees(comparison))
    return "\n\n".join([*told, plan_table(comparison.shown.plan, whole_plan)])


def _asked(question: Question) -> str:
    shape, batch = question.shape, question.batch
    new, cached = sum(n for n, _ in batch), sum(c for _, c in batch)
    ranks, prompts = _number(question.machine.num_ranks, "rank"), _number(len(batch), "prompt")
    heads = f"{shape.num_heads}:{shape.num_kv_heads} heads of {shape.head_dim}"
    return (
        f"{ranks} of {question.machine.name}; {heads}, "
        f"{shape.itemsize} bytes an element, {'causal' if question.causal else 'full'} mask; "
        f"{prompts}, {new:,} new and {cached:,} cached tokens"
    )


def _ranking(comparison: Comparison) -> str:
    question = comparison.question
    title = _number(len(comparison.ranked), "candidate")
    title += ", the best variant of each strategy; ms of a layer's attention"
    header = ["#", "plan", "attention", "exposed", "hidden", "ratio", "busiest link", "all links"]
    if question.whole_step:
        header.insert(2, "whole step")
    elif question.layout == "heads":
        header.insert(3, "K/V")
        title += ' and of its projections to new keys and values ("K/V")'
    rows = [(comparison.seconds(c), _row(comparison, place, c)) for place, c in comparison.of_each_strategy()]
    for b in comparison.beaten():
        cells = {"plan": str(b.variant), "ratio": f">={b.seconds / comparison.seconds(comparison.best):.2f}"}
        column, decimals = ("whole step", 1) if question.whole_step else ("attention", 3)
        cells[column] = f">={_ms(b.seconds, decimals)}"
        rows.append((b.seconds, cells))
    rows.sort(key=lambda row: row[0])
    table = _aligned([header, *([cells.get(name, "-") for name in header] for _, cells in rows)])
    return f"{title}{_left_out(comparison)}\n{table}"


def _row(comparison: Comparison, place: int, candidate: Candidate) -> dict[str, str]:
    """Cells by the names of their columns."""
    cost, pair = candidate.cost, busiest_link(candidate)
    cells = {
        "#": str(place),
        "plan": str(candidate.variant),
        "whole step": _ms(cost.step_seconds, 1),
        "attention": _ms(cost.seconds),
        "K/V": _ms(comparison.projection_seconds(candidate)),
        "exposed": _ms(cost.exposed),
        "hidden": _ms(cost.hidden),
        "ratio": f"{comparison.ratio(candidate):.2f}",
    }
    if pair:
        cells["busiest link"] = f"{size(cost.link_bytes[pair])} {pair[0]}>{pair[1]}"
        cells["all links"] = size(cost.total_bytes)
    return cells


def _ms(seconds: float, decimals: int = 3) -> str:
    return f"{seconds * 1e3:,.{decimals}f}"


def _degrees(comparison: Comparison) -> str:
    """What more ranks for each prompt gain."""
    question = comparison.question
    off = next(comparison.seconds(c) for c in comparison.ranked if c.variant == OFF)
    column, decimals = ("whole step", 1) if question.whole_step else ("attention", 3)
    rows = [["ranks", "plan", column, "faster than off"]]
    for degree, variant, seconds, bounded in comparison.of_each_degree():
        more, less = (">=", "<=") if bounded else ("", "")
        rows.append([str(degree), str(variant), f"{more}{_ms(seconds, decimals)}", f"{less}{off / seconds:.2f}x"])
    return f"The best plan of each number of ranks that share a prompt; ms\n{_aligned(rows)}"


def _left_out(comparison: Comparison) -> str:
    """Lines on the variants that were not costed."""
    told, slow = "", [b for b in comparison.bounded if b.slow]
    beaten = [b for b in comparison.bounded if not b.slow]
    if beaten:
        least = milliseconds(min(b.seconds for b in beaten))
        told += f"\n{len(beaten)} more are slower even if sending were free (>=): they take at least {least}"
    if slow:
        names = ", ".join(f"{b.variant} >= {milliseconds(b.seconds)}" for b in slow)
        told += f"\nnot costed, as so large a plan takes seconds (--all or --strategy does it): {names}"
    possible = len(comparison.question.variants())
    if possible > len(comparison.ranked) + len(comparison.bounded):
        told += f"\n(default options only, of so many ranks; --all costs all {possible} variants and takes minutes)"
    return told


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [x.ljust(w) if i == 1 else x.rjust(w) for i, (x, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def plan_table(plan: Plan, whole: bool = False) -> str:
    """Ranks down, rounds across; cut to a screen unless the whole is asked for."""
    lines = plan.table(None if whole else _MOST_LINES + 1).split("\n")
    if whole or (len(lines) <= _MOST_LINES and max(map(len, lines)) <= _MOST_COLUMNS):
        return "\n".join(lines)
    cut = [line if len(line) <= _MOST_COLUMNS else f"{line[: _MOST_COLUMNS - 1]}…" for line in lines[:_MOST_LINES]]
    ranks, rounds = plan.layout.num_ranks, len(plan.rounds)
    return "\n".join([*cut, f"(cut: --table prints all of {ranks} ranks x {rounds} rounds)"])


def busiest_link(candidate: Candidate) -> tuple[int, int] | None:
    """The (src, dst) that carries most bytes; None: nothing is sent."""
    links = candidate.cost.link_bytes
    return max(links, key=links.__getitem__, default=None)


def _number(count: int, of: str) -> str:
    return f"{count} {of}{'' if count == 1 else 's'}"


def milliseconds(seconds: float) -> str:
    """Three digits, and no finer than a microsecond."""
    value = round(seconds * 1e3, 3)
    return f"{value:,.{_decimals(value)}f} ms" if value else "0 ms"


def size(num_bytes: float) -> str:
    """Three digits, with a unit: 235 MB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.{_decimals(num_bytes / scale)}f} {unit}"
    return f"{num_bytes:.0f} B"


def _decimals(value: float) -> int:
    return max(0, 2 - max(0, len(str(int(value))) - 1)) if value >= 1 else 3
