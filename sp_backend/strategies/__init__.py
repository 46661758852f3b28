"""Strategies: pure functions that write a plan for a layout. A new one is a file here and a row in
STRATEGIES. Pure: no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, Literal

from sp_backend.check import check
from sp_backend.layout import History, Kind, Layout
from sp_backend.least import Least
from sp_backend.plan import Plan, PlanError
from sp_backend.proof import is_proven
from sp_backend.prune import complete, prune, replicate
from sp_backend.strategies import (
    all_gather_kv,
    decode,
    double_ring,
    hamilton,
    local,
    ring_pass_kv,
    ring_pass_q,
    sharded_q,
    token_ring,
    ulysses,
)


@dataclass(frozen=True, slots=True)
class Options:
    """What some strategies take beside the layout; None: the strategy's own default."""

    window_size: int | None = None  # double_ring: ranks of an inner ring; divides the degree
    ulysses_degree: int | None = None  # hybrid: ranks that trade heads; divides the degree
    ring_inside: bool = False  # hybrid: neighbours form the rings (else neighbours trade heads)
    num_rings: int | None = None  # hamilton: 1 to degree - 1
    cycles: tuple[tuple[int, ...], ...] | None = None  # hamilton: edge-disjoint, each lists all ranks once
    ranks_per_node: int | None = None  # hamilton: paths that use each rank's link to another node once a step
    redundant_kv: bool = False  # sharded_q: every rank computes keys and values of all new tokens

    def __post_init__(self) -> None:
        if self.cycles is not None:  # lists would not do as a key
            object.__setattr__(self, "cycles", tuple(map(tuple, self.cycles)))

    def given(self) -> dict[str, Any]:
        """The options that differ from their defaults, by name."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}


FLAGS = {  # the server's command line
    "window_size": "--sp-window-size",
    "ulysses_degree": "--sp-ulysses-degree",
    "num_rings": "--sp-num-rings",
    "cycles": "--sp-mapping",
    "redundant_kv": "--sp-redundant-kv",
}


@dataclass(frozen=True, slots=True)
class Variant:
    """A strategy with its options and its degree: what a plan is built from, beside the model's heads."""

    strategy: str
    options: Options = Options()
    degree: int | None = None  # ranks that share one sequence; None: all. Divides the number of ranks

    def __str__(self) -> str:
        """Short, unique and stable: the plan's name, a label of metrics, what users read."""
        options = self.options.given().items()
        given = ",".join(name if value is True else f"{name}={_short(value)}" for name, value in options)
        name = f"{self.strategy}({given})" if given else self.strategy
        return name if self.degree is None else f"{name}@{self.degree}"


def _short(value: Any) -> str:
    """A number as it is; cycles by their count and digest."""
    if isinstance(value, tuple):
        return f"{len(value)}:{hashlib.sha256(repr(value).encode()).hexdigest()[:8]}"
    return str(value)


@dataclass(frozen=True, slots=True)
class Strategy:
    build: Callable[..., Plan]  # (Layout, and as keywords the options that it takes)
    kinds: tuple[Kind, ...]  # layouts it works on; the first is the default
    takes: tuple[str, ...] = ()  # names of its Options
    useful: Callable[[int, int], Iterable[dict[str, Any]]] = lambda num_ranks, num_heads: [{}]  # options worth trying
    history: History = "all"
    layout: str | None = None  # the server's layout in which it can be asked for; None: chosen by the scheduler alone
    quick_ranks: int = 1024  # of more ranks, plans have so many instructions that costing one takes seconds
    # what a bound on a plan's time counts, of a number of ranks; see least.py
    calls: Callable[[int, Options], int] = lambda num_ranks, options: num_ranks
    more_rounds: int = 0  # than calls
    sharers: Callable[[int, Options], int] = lambda num_ranks, options: 1


def _all(num_ranks: int, options: Options) -> int:
    return num_ranks


def _team(num_ranks: int, options: Options) -> int:
    """Ranks of hybrid that trade heads."""
    return options.ulysses_degree or ulysses.nearest_root(num_ranks)


SPREAD: tuple[Kind, ...] = ("zigzag", "contiguous")
STRATEGIES: dict[str, Strategy] = {
    "ring_pass_kv": Strategy(ring_pass_kv.build_down, SPREAD, layout="tokens"),
    "ring_pass_kv_up": Strategy(ring_pass_kv.build_up, SPREAD, layout="tokens"),
    "ring_pass_kv_both": Strategy(ring_pass_kv.build_both, SPREAD, layout="tokens"),
    "ring_pass_q": Strategy(ring_pass_q.build, SPREAD, layout="tokens", more_rounds=1, sharers=_all),
    "token_ring": Strategy(token_ring.build, SPREAD, layout="tokens", more_rounds=1, sharers=_all),
    "hamilton": Strategy(
        hamilton.build,
        SPREAD,
        ("num_rings", "cycles", "ranks_per_node"),
        hamilton.ring_counts,
        layout="tokens",
        quick_ranks=32,
        calls=lambda n, options: hamilton.least_rounds(n, options.num_rings),
    ),
    "all_gather_kv": Strategy(all_gather_kv.build, SPREAD, layout="tokens", calls=lambda n, _: min(n, 2)),
    "ulysses": Strategy(
        ulysses.build,
        SPREAD,
        useful=ulysses.fits,
        layout="tokens",
        quick_ranks=32,
        calls=lambda n, _: 1,
        more_rounds=2,
        sharers=_all,
    ),
    "hybrid": Strategy(
        ulysses.build_hybrid,
        SPREAD,
        ("ulysses_degree", "ring_inside"),
        ulysses.hybrids,
        layout="tokens",
        calls=lambda n, options: n // _team(n, options),
        more_rounds=2,
        sharers=_team,
    ),
    "double_ring": Strategy(double_ring.build, SPREAD, ("window_size",), double_ring.windows, layout="tokens"),
    "sharded_q": Strategy(
        sharded_q.build,
        ("heads",),
        ("redundant_kv",),
        sharded_q.fits,
        layout="heads",
        calls=lambda n, _: 1,
        sharers=_all,
    ),
    "decode": Strategy(decode.build, ("home", "heads"), calls=lambda n, _: 1, sharers=_all),
    "local": Strategy(local.build, ("home",), history="own", calls=lambda n, _: 1),
}


def plan_for(
    variant: Variant | str,
    *,
    num_ranks: int,
    num_heads: int,
    num_kv_heads: int,
    causal: bool = True,
    redundant_kv: bool = False,
    kind: Kind | None = None,
    copies: bool = False,
    proven: bool = True,
) -> Plan:
    """Build, prune and prove a strategy's plan, once for the same arguments.

    variant: a strategy's name stands for its defaults. kind: None is the first layout of the strategy.
    copies: every rank has all cached tokens and keeps all new ones (history "copies" of Layout).
    proven: False is for predictions alone; what is shown or run is proved.
    Raises ValueError for sizes and options that do not fit it.
    """
    if isinstance(variant, str):
        variant = Variant(variant)
    row = _row(variant)
    kind = kind or row.kinds[0]
    if kind not in row.kinds:
        raise ValueError(f"strategy {variant.strategy} works on layouts {', '.join(row.kinds)}, not {kind}")
    history: History = "copies" if copies else row.history
    layout = Layout(num_ranks, kind, num_heads, num_kv_heads, causal, history, redundant_kv)
    return _proven(variant, layout) if proven else _plan(variant, layout)


@lru_cache(maxsize=1024)
def _proven(variant: Variant, layout: Layout) -> Plan:
    return prove(_plan(variant, layout))


@lru_cache(maxsize=1024)
def _plan(variant: Variant, layout: Layout) -> Plan:
    """layout: of one group of all ranks, which a degree cuts."""
    if variant.degree is None or variant.degree == layout.group_size:
        row = STRATEGIES[variant.strategy]
        options = {name: getattr(variant.options, name) for name in row.takes}
        plan = prune(complete(row.build(layout, **options)))
    else:
        groups = replace(layout, history="own", degree=variant.degree)  # refuses a degree that does not fit
        plan = replicate(_plan(replace(variant, degree=None), replace(layout, num_ranks=variant.degree)), groups)
    return replace(plan, name=str(variant))


def _row(variant: Variant) -> Strategy:
    """A variant's row of the table. Raises ValueError if there is none, or if it does not take what is given."""
    if variant.strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {variant.strategy!r}; known: {', '.join(STRATEGIES)}")
    strategy = STRATEGIES[variant.strategy]
    if variant.degree is not None and strategy.history == "own":
        raise ValueError(f"strategy {variant.strategy} takes no degree: every sequence lives on one rank")
    for name in variant.options.given():
        if name not in strategy.takes:
            flag = f" ({FLAGS[name]})" if name in FLAGS else ""
            takers = ", ".join(n for n, s in STRATEGIES.items() if name in s.takes)
            raise ValueError(f"{name}{flag} is not an option of strategy {variant.strategy}; it is one of: {takers}")
    return strategy


def least_of(variant: Variant, degree: int) -> Least:
    """What its plans do at least, of groups of `degree` ranks."""
    row = STRATEGIES[variant.strategy]
    calls = row.calls(degree, variant.options)
    return Least(
        degree=degree,
        chunks=degree * (2 if row.kinds[0] == "zigzag" else 1),
        rounds=calls + row.more_rounds,
        calls=calls,
        sharers=row.sharers(degree, variant.options),
    )


def variants(num_ranks: int, num_heads: int, layout: Literal["tokens", "heads"] = "tokens") -> list[Variant]:
    """Every sensible variant that fits, full degree first: what a planner chooses from.

    decode and local are not among them: they suit a kind of step and not a size.
    """
    degrees = [d for d in range(num_ranks, 1, -1) if num_ranks % d == 0 and (layout == "tokens" or d == num_ranks)]
    return [
        Variant(name, Options(**options), None if degree == num_ranks else degree)
        for degree in degrees or [1]
        for name, strategy in STRATEGIES.items()
        if strategy.layout == layout
        for options in strategy.useful(degree, num_heads)
    ]


def prove(plan: Plan) -> Plan:
    """The plan itself, if check() finds nothing wrong with it (which is_proven() spares where it can)."""
    errors = () if is_proven(plan) else check(plan).errors
    if errors:
        shown = "\n  ".join(errors[:10])
        raise PlanError(f"plan {plan.name} on {plan.layout} has {len(errors)} errors:\n  {shown}")
    return plan
