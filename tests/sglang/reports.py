"""What the plugin logs of each sharded batch, on every rank."""

from __future__ import annotations

import re
from dataclasses import dataclass

ROUNDS = {  # of each plan: those in which a rank sends or receives, over P ranks
    "ring_pass_kv": lambda size: size - 1,
    "ring_pass_kv_both": lambda size: size - 1,
    "all_gather_kv": lambda size: 1,
    "token_ring": lambda size: size + 1,  # P-1 for Q, and states leave one after they were computed
    "ring_pass_q": lambda size: size + 1,  # P-1 for Q, one more for keys to keep, one for states
}
_LINE = re.compile(
    r"(?P<name>sp_\w+): rank (?P<rank>\d+), (?P<new>\d+) new and (?P<cached>\d+) cached tokens of (?P<prompts>\d+) "
    r"prompts, (?P<plan>\w+): (?P<rounds>\d+) rounds in each of (?P<layers>\d+) layers, sent (?P<sent>[\d.]+) MB, of "
    r"them (?P<kept>[\d.]+) MB"
)


@dataclass(frozen=True)
class Report:
    name: str
    rank: int
    new: int
    cached: int
    prompts: int
    plan: str
    rounds: int
    layers: int
    sent: float  # MB
    kept: float


def read_reports(log: str) -> list[Report]:
    return [
        Report(
            **{name: m[name] for name in ("name", "plan")},
            **{name: int(m[name]) for name in ("rank", "new", "cached", "prompts", "rounds", "layers")},
            **{name: float(m[name]) for name in ("sent", "kept")},
        )
        for m in _LINE.finditer(log)
    ]
