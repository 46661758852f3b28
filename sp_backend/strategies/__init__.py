"""Strategies: pure functions that write a plan for a layout. A new one is a file here and a row in
STRATEGIES.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from sp_backend.check import check
from sp_backend.layout import History, Kind, Layout
from sp_backend.plan import Plan, PlanError, prune
from sp_backend.strategies import decode, local, ring_pass_kv, sharded_q, token_ring


@dataclass(frozen=True, slots=True)
class Strategy:
    build: Callable[[Layout], Plan]
    kinds: tuple[Kind, ...]  # layouts it works on; the first is the default
    history: History = "all"
    layout: str | None = None  # the server's layout in which it can be asked for; None: chosen by the scheduler alone


STRATEGIES: dict[str, Strategy] = {
    "ring_pass_kv": Strategy(ring_pass_kv.build_down, ("zigzag", "contiguous"), layout="tokens"),
    "ring_pass_kv_up": Strategy(ring_pass_kv.build_up, ("zigzag", "contiguous"), layout="tokens"),
    "token_ring": Strategy(token_ring.build, ("zigzag", "contiguous"), layout="tokens"),
    "sharded_q": Strategy(sharded_q.build, ("heads",), layout="heads"),
    "decode": Strategy(decode.build, ("home", "heads")),
    "local": Strategy(local.build, ("home",), history="own"),
}


@lru_cache(maxsize=256)
def plan_for(
    name: str,
    *,
    num_ranks: int,
    num_heads: int,
    num_kv_heads: int,
    causal: bool = True,
    redundant_kv: bool = False,
    kind: Kind | None = None,
) -> Plan:
    """Build, prune and prove a strategy's plan. Raises ValueError for sizes that do not fit it."""
    if name not in STRATEGIES:
        raise ValueError(f"unknown strategy {name!r}; known: {', '.join(STRATEGIES)}")
    strategy = STRATEGIES[name]
    kind = kind or strategy.kinds[0]
    if kind not in strategy.kinds:
        raise ValueError(f"strategy {name} works on layouts {', '.join(strategy.kinds)}, not {kind}")
    layout = Layout(num_ranks, kind, num_heads, num_kv_heads, causal, strategy.history, redundant_kv)
    return prove(prune(strategy.build(layout)))


def prove(plan: Plan) -> Plan:
    """The plan itself, if check() finds nothing wrong with it."""
    errors = check(plan).errors
    if errors:
        shown = "\n  ".join(errors[:10])
        raise PlanError(f"plan {plan.name} on {plan.layout} has {len(errors)} errors:\n  {shown}")
    return plan
