"""The library's functions on real ranks: every format, strategy and kind of batch against attention in fp64."""

from __future__ import annotations

import gc
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import sp_backend
from sp_backend import engine
from sp_backend.geometry import Geometry, predicted_bytes
from sp_backend.presets import preset
from sp_backend.strategies import Options, plan_for, variants
from tests.ranks import run_on_ranks
from tests.sp_backend.dense import full_attention

WORLD = 4  # one pool of processes for all tests
RAGGED = (37, 1, 3, 0, 12)
PAGE = Path(__file__).parents[2] / "docs" / "library.md"


@dataclass(frozen=True)
class Case:
    """A batch of random sequences; some of their keys are cached, spread unevenly over the ranks."""

    lengths: tuple[int, ...] = RAGGED
    cached: tuple[int, ...] = ()
    heads: tuple[int, int] = (12, 4)
    head_dim: int = 8
    dtype: torch.dtype = torch.float32
    input_format: str = "TND"
    arguments: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """q, k and v of each sequence, its cached keys first: [tokens, heads, head_dim]."""
        generator = torch.Generator().manual_seed(0)

        def normal(lengths: Sequence[int], heads: int) -> list[Tensor]:
            return [torch.randn(n, heads, self.head_dim, generator=generator).to(self.dtype) for n in lengths]

        num_heads, num_kv_heads = self.heads
        keys = [n + c for n, c in zip(self.lengths, self.history_sizes, strict=True)]
        return normal(self.lengths, num_heads), normal(keys, num_kv_heads), normal(keys, num_kv_heads)

    @property
    def history_sizes(self) -> tuple[int, ...]:
        return self.cached or (0,) * len(self.lengths)

    def formatted(self, sequences: Sequence[Tensor]) -> Tensor:
        """New tokens of all sequences, [tokens, heads, ...] each, in the input format."""
        if self.input_format == "TND":
            return torch.cat(list(sequences))
        x = torch.stack(list(sequences), dim=self.input_format.index("B"))
        return x.flatten(2) if self.input_format.endswith("H") else x

    def expected(self) -> tuple[Tensor, Tensor]:
        """out and lse of full attention, in the input format."""
        options = {name: self.arguments[name] for name in ("causal", "scale") if name in self.arguments}
        pairs = [full_attention(*qkv, **options) for qkv in zip(*self.tensors(), strict=True)]
        lse = [lse for _, lse in pairs]
        if self.input_format == "TND":
            return self.formatted([out for out, _ in pairs]), torch.cat(lse)
        return self.formatted([out for out, _ in pairs]), torch.stack(lse, self.input_format.index("B"))


def attend(rank: int, size: int, num_ranks: int, cases: list[Case]) -> list[tuple[Tensor, Tensor]]:
    """out and lse of each case, put together again on each rank of a group of the first ranks."""
    group = dist.new_group(list(range(num_ranks)))
    return [attend_case(case, group, rank, num_ranks) for case in cases] if rank < num_ranks else []


def attend_case(case: Case, group: dist.ProcessGroup, rank: int, num_ranks: int) -> tuple[Tensor, Tensor]:
    sequences, keys, values = case.tensors()
    new = [
        sequences,
        [x[c:] for x, c in zip(keys, case.history_sizes, strict=True)],
        [x[c:] for x, c in zip(values, case.history_sizes, strict=True)],
    ]
    lengths = case.lengths if case.input_format == "TND" else case.lengths[0]
    where = {"group": group, "input_format": case.input_format, "layout": case.arguments.get("layout", "zigzag")}
    q, k, v = (sp_backend.shard(case.formatted(x), lengths, **where) for x in new)
    arguments = {"strategy": "ring_pass_kv"} | case.arguments | where | {"lengths": lengths, "return_lse": True}
    if case.input_format.endswith("H"):
        arguments["num_heads"] = case.heads[0]
    if case.cached:
        arguments["history"] = history_of(rank, num_ranks, keys, values, case.cached)
    out, lse = sp_backend.attention(q, k, v, **arguments)
    assert (out.dtype, lse.dtype) == (case.dtype, torch.float32) and out.is_contiguous()
    return sp_backend.unshard(out, lengths, **where), sp_backend.unshard(lse, lengths, **where)


def history_of(
    rank: int, num_ranks: int, keys: list[Tensor], values: list[Tensor], cached: tuple[int, ...]
) -> sp_backend.History:
    owners = [torch.arange(n) ** 2 % (s + 3) % num_ranks for s, n in enumerate(cached)]
    k, v = (
        torch.cat([x[:n][owner == rank] for x, n, owner in zip(xs, cached, owners, strict=True)])
        for xs in (keys, values)
    )
    return sp_backend.History(k, v, [owner.bincount(minlength=num_ranks).tolist() for owner in owners])


def check(num_ranks: int, cases: list[Case], tolerance: float = 1e-5) -> None:
    """Every rank's result of each case is full attention's."""
    by_rank = run_on_ranks(WORLD, attend, num_ranks, cases)[:num_ranks]
    for i, case in enumerate(cases):
        for got, want in zip(by_rank[0][i], case.expected(), strict=True):
            error = float((got - want).abs().max()) if want.numel() else 0.0
            assert error <= tolerance, f"{case}: {error}"
        for results in by_rank[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[i], by_rank[0][i], strict=True)), case


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_every_strategy_on_ragged_batches_with_history(num_ranks: int) -> None:
    check(
        num_ranks,
        [
            Case(
                cached=(20, 0, 50, 7, 1),
                arguments={"strategy": v.strategy, "options": v.options, "layout": layout, "causal": causal},
            )
            for v in variants(num_ranks, Case.heads[0])
            if v.degree is None
            for layout in ("zigzag", "contiguous")
            for causal in (True, False)
        ],
    )


@pytest.mark.parametrize("input_format", ["TND", "BSND", "SBND", "BSH", "SBH"])
def test_every_format_with_lengths_that_no_number_of_ranks_divides(input_format: str) -> None:
    for heads in ((6, 2), (4, 4), (4, 1)):
        cases = [Case((n,) * 3, heads=heads, input_format=input_format) for n in (29, 5, 1)]
        check(3, cases)
        check(2, cases[:1])


def test_vision_segments_see_all_of_their_own_segment() -> None:
    check(2, [Case((1024,) * 62, heads=(1, 1), arguments={"causal": False, "layout": "contiguous"})])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_half_precision_follows_fp64_within_its_rounding(dtype: torch.dtype, tolerance: float) -> None:
    check(3, [Case((70, 9), (30, 0), head_dim=16, dtype=dtype)], tolerance)


def chosen(rank: int, size: int, cases: list[Case]) -> list[str]:
    """The strategy of each case's plan, by the links and rates that a preset says."""
    group, names = dist.new_group([0, 1, 2]), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "machine_of", lambda *measured: preset("loopback-3"))
        for case in cases if rank < 3 else []:
            attend_case(case, group, rank, 3)
            names.append(str(list(engine.engine_of(group)._executors)[-1].strategy))
    return names


def test_auto_gives_all_ranks_one_strategy_that_leaves_the_larger_operand_where_it_is() -> None:
    auto: dict[str, Any] = {"strategy": "auto"}
    many_keys = Case((3,), (20_000,), heads=(2, 2), arguments=auto)
    many_queries = Case((600,), heads=(32, 1), arguments=auto)
    by_rank = run_on_ranks(WORLD, chosen, [many_keys, many_queries])[:3]
    assert by_rank[0] == by_rank[1] == by_rank[2]
    assert [name in ("ring_pass_q", "token_ring") for name in by_rank[0]] == [True, False]


def attend_measured(rank: int, size: int, cases: list[Case], folder: str) -> list[tuple[Tensor, Tensor]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", folder)
        return attend(rank, size, 2, cases)


def test_auto_measures_the_machine_once(tmp_path: Path) -> None:
    case = Case(cached=(20, 0, 50, 7, 1), heads=(2, 1), arguments={"strategy": "auto"})
    outs = run_on_ranks(WORLD, attend_measured, [case, case], str(tmp_path))[:2]
    assert all(float((out - case.expected()[0]).abs().max()) < 1e-5 for results in outs for out, _ in results)
    assert len(list(tmp_path.glob("sp-serve/machine-*.json"))) == 1


def test_a_cache_may_lie_on_one_rank_and_a_batch_may_be_empty() -> None:
    check(3, [Case((5,), (1,)), Case((5, 2), (1, 1)), Case((0,)), Case((0, 0), input_format="BSH")])


def test_scale_is_that_of_the_scores() -> None:
    check(2, [Case(arguments={"scale": 0.125})])


def attend_in_reversed_group(rank: int, size: int) -> Tensor | None:
    group = dist.new_group([2, 0, 1], sort_ranks=False)
    return attend_case(Case(), group, group.rank(), 3)[0] if rank < 3 else None


def test_a_group_keeps_its_own_order_of_ranks() -> None:
    outs = run_on_ranks(WORLD, attend_in_reversed_group)
    assert all(torch.equal(out, outs[0]) for out in outs[:3])
    torch.testing.assert_close(outs[0].double(), Case().expected()[0], atol=1e-5, rtol=1e-5)


def attend_twice(rank: int, size: int) -> tuple[int, int]:
    """Groups kept before, and after a group has been used twice and destroyed."""
    before = len(engine._ENGINES)
    group = dist.new_group([0, 1])
    if rank < 2:
        first, second = (attend_case(Case(), group, rank, 2)[0] for _ in range(2))
        assert torch.equal(first, second)
        kept = engine._ENGINES[group]
        assert kept.prepare.cache_info().misses == len(kept._executors) == 1
        plan = plan_for("ring_pass_kv", num_ranks=2, num_heads=12, num_kv_heads=4)
        geometry = Geometry([(*plan.layout.cut_pages(n, 1), 0, 0) for n in RAGGED])
        once = sum(links[rank, 1 - rank] for links in predicted_bytes(plan, geometry, head_dim=8, itemsize=4))
        assert sp_backend.counters(group).bytes_sent == 2 * once
        dist.destroy_process_group(group)
    del group
    gc.collect()
    return before, len(engine._ENGINES)


def test_a_group_keeps_its_plans_and_sends_what_they_predict() -> None:
    for before, after in run_on_ranks(WORLD, attend_twice):
        assert after == before, "and it is forgotten when it is destroyed"


def attend_in_mesh(rank: int, size: int) -> Tensor:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    out, again = (attend_case(Case(), mesh["cp"].get_group(), rank % 2, 2)[0] for _ in range(2))
    assert torch.equal(out, again)
    return out


def test_both_halves_of_a_device_mesh_work_side_by_side() -> None:
    for out in run_on_ranks(WORLD, attend_in_mesh):
        assert float((out - Case().expected()[0]).abs().max()) < 1e-5


def attend_fused(rank: int, size: int) -> tuple[Tensor, Tensor]:
    """q, k and v as views of one projection, as models make them; and the whole of it."""
    qkv = torch.randn(11, 8, 6, generator=torch.Generator().manual_seed(0))
    q, k, v = sp_backend.shard(qkv, 11).split((4, 2, 2), dim=1)
    out = sp_backend.attention(q, k, v, lengths=11, strategy="token_ring")
    return sp_backend.unshard(out, 11), qkv


def test_views_of_a_fused_projection_need_no_copy_by_the_caller() -> None:
    out, qkv = run_on_ranks(WORLD, attend_fused)[0]
    assert float((out - full_attention(*qkv.split((4, 2, 2), dim=1))[0]).abs().max()) < 1e-5


def shards_of_ids(rank: int, size: int) -> list[Tensor]:
    ids = torch.arange(11)
    both = sp_backend.shard(ids, (7, 4))
    assert torch.equal(sp_backend.unshard(both, (7, 4)), ids)
    batch = sp_backend.shard(torch.stack((ids, ids + 100)), 11, layout="contiguous", input_format="BSND")
    positions = sp_backend.position_ids((7, 4), start=(0, 50)), sp_backend.position_ids(11, layout="contiguous")
    return [both, batch, *positions, sp_backend.shard(torch.arange(16), 16)]


def test_rows_go_sequence_by_sequence_and_by_position_in_each() -> None:
    both, batch, positions, batch_positions, divisible = run_on_ranks(WORLD, shards_of_ids)[1]
    assert both.tolist() == [0, 5, 7]
    assert positions.tolist() == [0, 5, 50]
    assert batch.tolist() == [[2, 3, 4], [102, 103, 104]]
    assert batch_positions.tolist() == [2, 3, 4]
    assert divisible.tolist() == [2, 3, 12, 13], "chunks 1 and 6 of 8, as Megatron cuts"


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(*shape, **options)


HALF = {"q": zeros(5, 4, 8), "k": zeros(5, 2, 8), "v": zeros(5, 2, 8), "lengths": 10}  # of a sequence, for 2 ranks
REFUSED: dict[str, dict[str, Any]] = {  # what the message says: what is passed in place of HALF's, or beside it
    "strategy is 'rign'.*ring_pass_kv": {"strategy": "rign"},
    "strategy is 'sharded_q'": {"strategy": "sharded_q"},
    "window_size .*not an option of strategy ring_pass_kv": {
        "options": Options(window_size=2),
        "strategy": "ring_pass_kv",
    },
    "options: strategy 'auto' chooses them": {"options": Options(window_size=2), "strategy": "auto"},
    "layout is 'home'.*zigzag": {"layout": "home"},
    "input_format is 'THD'.*TND": {"input_format": "THD"},
    "rank . has 5 tokens in all.*give it 10.*shard": {"lengths": (10, 10)},
    "lengths is 'ten'": {"lengths": "ten"},
    r"lengths is \[10, -1\]": {"lengths": [10, -1]},
    "lengths is .*one length for all": {"q": zeros(2, 5, 4, 8), "lengths": (9, 10), "input_format": "BSND"},
    "q of shape .* input_format SBND": {"input_format": "SBND"},
    "num_heads is None: input_format BSH": {"input_format": "BSH"},
    "num_heads: .*leave it out": {"num_heads": 4},
    "q is torch.float64: convert": {"q": zeros(5, 4, 8, dtype=torch.float64)},
    "k is torch.bfloat16 and q torch.float32": {"k": zeros(5, 2, 8, dtype=torch.bfloat16)},
    "q is on meta": {"q": zeros(5, 4, 8, device="meta")},
    "q requires a gradient": {"q": zeros(5, 4, 8, requires_grad=True)},
    "k has shape .* and v": {"v": zeros(5, 1, 8)},
    "k has shape .* and q .*head_dim": {"q": zeros(5, 4, 16)},
    "k has 2 heads: give a divisor of the 3": {"q": zeros(5, 3, 8)},
    "k has 2 heads: give a divisor of the 0": {"q": zeros(5, 0, 8)},
    "head_dim must be even": dict.fromkeys("qkv", zeros(5, 2, 7)),
    "q of shape .* nothing along its last axis": dict.fromkeys("qkv", zeros(5, 2, 0)),
    "scale is -0.1: give a number of at least 0": {"scale": -0.1},
    "scale is nan": {"scale": float("nan")},
    "history's lengths: give 1 sequences of 2 ranks": {"history": (zeros(3, 2, 8), zeros(3, 2, 8), [[3]])},
    "one of history's lengths is": {"history": (zeros(3, 2, 8), zeros(3, 2, 8), [[3, "4"]])},
    "history's k is .*must be": {"history": (zeros(2, 2, 8), zeros(2, 2, 8), [[3, 4]])},
    "group is 'mine'": {"group": "mine"},
}
DIFFERENT: dict[str, list[dict[str, Any]]] = {  # what the message says: what each rank passes
    "causal: ranks . and . differ": [{"causal": True}, {"causal": False}],
    "strategy: ranks . and . differ": [{"strategy": "ring_pass_kv"}, {"strategy": "token_ring"}],
    "lengths: ranks . and . differ": [{"lengths": (10, 0)}, {"lengths": (0, 10)}],
}


def refusals(rank: int, size: int) -> list[str]:
    """The message of each refused call; afterwards the group still works."""
    group = dist.new_group([0, 1])
    if rank > 1:
        return []
    messages = []
    for changes in [*REFUSED.values(), *(by_rank[rank] for by_rank in DIFFERENT.values())]:
        with pytest.raises(ValueError) as refusal:
            sp_backend.attention(**{"group": group} | HALF | changes)
        messages.append(str(refusal.value))
    attend_case(Case(), group, rank, 2)
    return messages


def test_what_does_not_fit_is_refused_by_name_on_every_rank() -> None:
    for messages in run_on_ranks(WORLD, refusals)[:2]:
        for pattern, message in zip([*REFUSED, *DIFFERENT], messages, strict=True):
            assert re.search(pattern, message), f"{message!r} does not say {pattern!r}"


def run_snippets(rank: int, size: int, snippets: list[str]) -> tuple[int, ...]:
    """The page's code, on two sequences as it says, with a model of random keys and values."""
    group = dist.new_group([0, 1])
    if rank > 1:
        return ()

    def model(ids: Tensor, positions: Tensor) -> list[Tensor]:
        assert ids.shape == positions.shape
        return [torch.randn(len(ids), heads, 8) for heads in (4, 2, 2)]

    cached = [1200, 805][rank]
    names: dict[str, Any] = {
        "token_ids": torch.arange(3037),
        "model": model,
        "cached_k": torch.randn(cached, 2, 8),
        "cached_v": torch.randn(cached, 2, 8),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "process_group", lambda given: group)  # the page has 2 ranks in all
        patch.setattr(engine, "machine_of", lambda *measured: preset("loopback-2"))
        for snippet in snippets:
            exec(snippet, names)
    return names["out"].shape, names["full"].shape


def test_the_snippets_of_the_page_run() -> None:
    snippets = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    results = run_on_ranks(WORLD, run_snippets, snippets)
    assert [out[0] for out, _ in results[:2]] == [1519, 1518]
    assert all(full == (3037, 4, 8) for _, full in results[:2])


def test_without_torch_distributed_it_says_what_to_call() -> None:
    x = torch.zeros(1, 2, 8)
    with pytest.raises(ValueError, match="init_process_group"):
        sp_backend.attention(x, x, x, lengths=1)


def test_the_package_gives_the_names_that_it_lists_and_no_others() -> None:
    assert all(callable(getattr(sp_backend, name)) for name in sp_backend.__all__)
    with pytest.raises(AttributeError, match="no attribute 'atention'"):
        sp_backend.atention  # noqa: B018
