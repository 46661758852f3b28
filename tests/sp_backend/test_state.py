"""Merging states is softmax over the union of their keys, in any order, empty ones included: in one native pass and in
torch's steps.
"""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sp_backend import native, state
from sp_backend.state import AttentionState

ROWS, HEADS, DIM = 3, 2, 4


@pytest.fixture(scope="module", params=["native", "in steps"], autouse=True)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        native.load("passes")  # else both would be torch's steps
        patch.setattr(state, "_native", lambda: request.param == "native")
        yield request.param


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
    own = state_of(*case[:2])
    empty = AttentionState.empty(ROWS, HEADS, DIM)
    for merged in (own.merge(empty), empty.merge(own)):
        assert torch.equal(merged.out, own.out) and torch.equal(merged.lse, own.lse)


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


@pytest.mark.parametrize("dim", [1, 33, 64])
def test_a_merge_is_written_elsewhere(monkeypatch: pytest.MonkeyPatch, dim: int) -> None:
    """In parts, of views too; it changes neither side, and rounds once if the target is in bf16."""
    monkeypatch.setattr("sp_backend.state._PART", 2 * HEADS * dim)
    wide = [AttentionState(torch.randn(9, HEADS + 2, dim), 9 * torch.randn(9, HEADS + 2)) for _ in range(2)]
    a, b = (each.heads(1, 1 + HEADS).rows(2, 9) for each in wide)
    exact = AttentionState(a.out.double(), a.lse.double()).merge(AttentionState(b.out.double(), b.lse.double()))
    want, before = a.merge(b), [each.out.clone() for each in wide]
    assert close(want, AttentionState(exact.out.float(), exact.lse.float()))
    for dtype in (torch.float32, torch.bfloat16):
        target = AttentionState(torch.full((7, HEADS, dim), torch.nan, dtype=dtype), torch.full((7, HEADS), torch.nan))
        a.merge_to(b, target)
        assert target.out.equal(want.out.to(dtype)) and target.lse.equal(want.lse)
    assert all(each.out.equal(was) for each, was in zip(wide, before, strict=True))


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_any_side_may_be_in_lower_precision(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    a, b = (AttentionState(torch.randn(5, HEADS, DIM).to(dtype), torch.randn(5, HEADS)) for dtype in dtypes)
    want = AttentionState(a.out.float(), a.lse).merge(AttentionState(b.out.float(), b.lse))
    assert a.merge(b).out.equal(want.out.bfloat16())


def test_states_of_other_sizes_are_refused() -> None:
    a, b = AttentionState.empty(3, 2, 8), AttentionState.empty(4, 2, 8)
    with pytest.raises(RuntimeError):
        a.merge(b)
