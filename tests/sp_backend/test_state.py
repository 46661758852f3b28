"""Merging states is softmax over the union of their keys, in any order, empty ones included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sp_backend.state import AttentionState

ROWS, HEADS, DIM = 3, 2, 4


def state_of(scores: Tensor, values: Tensor) -> AttentionState:
    """fp64 attention: scores [rows, heads, keys], values [keys, heads, dim]."""
    lse = torch.logsumexp(scores, -1)
    out = torch.einsum("rhk,khd->rhd", scores.softmax(-1).nan_to_num(0.0), values)
    return AttentionState(out.float(), lse.float())


@st.composite
def parts(draw: st.DrawFn) -> tuple[Tensor, Tensor, list[int]]:
    """Scores with some keys masked (-inf), values, and how many keys each part gets."""
    sizes = draw(st.lists(st.integers(0, 3), min_size=2, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.1, 5.0, 80.0]))
    scores = torch.randn(ROWS, HEADS, sum(sizes), generator=generator, dtype=torch.float64) * scale
    masked = torch.rand(scores.shape, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    values = torch.randn(sum(sizes), HEADS, DIM, generator=generator, dtype=torch.float64)
    return scores.masked_fill(masked, -torch.inf), values, sizes


def close(a: AttentionState, b: AttentionState) -> bool:
    return torch.allclose(a.out, b.out, rtol=1e-4, atol=2e-6) and torch.allclose(a.lse, b.lse, rtol=1e-6, atol=2e-6)


def split(case: tuple[Tensor, Tensor, list[int]]) -> list[AttentionState]:
    scores, values, sizes = case
    pairs = zip(scores.split(sizes, -1), values.split(sizes), strict=True)
    return [state_of(s, v) for s, v in pairs]


@settings(max_examples=150, deadline=None)
@given(parts())
def test_merged_parts_are_attention_over_all_keys(case: tuple[Tensor, Tensor, list[int]]) -> None:
    merged = AttentionState.empty(ROWS, HEADS, DIM)
    for part in split(case):
        merged.merge_(part)
    assert close(merged, state_of(*case[:2]))
    assert not merged.out.isnan().any() and not merged.lse.isnan().any()


@settings(max_examples=100, deadline=None)
@given(parts())
def test_merge_is_commutative_and_associative(case: tuple[Tensor, Tensor, list[int]]) -> None:
    first, second, *rest = split(case)
    third = rest[0] if rest else AttentionState.empty(ROWS, HEADS, DIM)
    assert close(first.merge(second), second.merge(first))
    assert close(first.merge(second).merge(third), first.merge(second.merge(third)))


@settings(max_examples=50, deadline=None)
@given(parts())
def test_the_empty_state_changes_nothing(case: tuple[Tensor, Tensor, list[int]]) -> None:
    state = state_of(*case[:2])
    empty = AttentionState.empty(ROWS, HEADS, DIM)
    for merged in (state.merge(empty), empty.merge(state)):
        assert torch.equal(merged.out, state.out) and torch.equal(merged.lse, state.lse)


def test_merge_leaves_its_operands_and_merge_in_place_writes_only_the_first() -> None:
    a = AttentionState(torch.ones(1, 1, 2), torch.zeros(1, 1))
    b = AttentionState(torch.zeros(1, 1, 2), torch.zeros(1, 1))
    merged = a.merge(b)
    assert a.out.eq(1).all() and b.out.eq(0).all() and merged.out.eq(0.5).all()
    assert merged.lse.item() == pytest.approx(torch.tensor(2.0).log().item())
    a.heads(0, 1).rows(0, 1).merge_(b)
    assert a.out.eq(0.5).all() and b.lse.eq(0).all()


def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    low = AttentionState(torch.zeros(1, 1, 2), torch.full((1, 1), -1e4))
    high = AttentionState(torch.ones(1, 1, 2), torch.full((1, 1), 1e4))
    for merged in (low.merge(high), high.merge(low)):
        assert merged.out.eq(1).all() and merged.lse.item() == 1e4


def test_a_partial_result_in_lower_precision_is_merged_into_fp32() -> None:
    a = AttentionState(torch.full((1, 1, 2), 0.1), torch.zeros(1, 1))
    merged = a.merge(AttentionState(torch.ones(1, 1, 2, dtype=torch.bfloat16), torch.zeros(1, 1)))
    assert merged.out.dtype == torch.float32 and torch.allclose(merged.out, torch.tensor(0.55))


def test_a_merge_is_written_elsewhere_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """And changes neither side, and rounds once if the target is in bf16."""
    monkeypatch.setattr("sp_backend.state._PART", 2 * HEADS * DIM)
    a = AttentionState(torch.randn(7, HEADS, DIM), torch.randn(7, HEADS))
    b = AttentionState(torch.randn(7, HEADS, DIM), torch.randn(7, HEADS))
    want, before = a.merge(b), a.out.clone()
    for dtype in (torch.float32, torch.bfloat16):
        target = AttentionState(torch.full((7, HEADS, DIM), torch.nan, dtype=dtype), torch.full((7, HEADS), torch.nan))
        a.merge_to(b, target)
        assert target.out.equal(want.out.to(dtype)) and target.lse.equal(want.lse)
    assert a.out.equal(before)
