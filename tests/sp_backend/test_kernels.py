"""Each kernel against the reference in fp64: masks, heads, windows, empty rows, low precision."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sp_backend.kernels import HeadMap, HeadRun, Span, Work, get_kernel
from sp_backend.native import choose_kernel
from sp_backend.state import AttentionState

CHOSEN, WHY = choose_kernel()
NATIVE = pytest.param("native", marks=pytest.mark.skipif(CHOSEN != "native", reason=WHY))
FAST = ["torch_cpu", NATIVE]


def make_work(
    lengths: list[tuple[int, int]],
    *,
    heads: HeadMap,
    head_dim: int = 16,
    causal: bool = False,
    window: int | None = None,
    offset: int = 0,
) -> tuple[Work, torch.Tensor, torch.Tensor]:
    """Spans of the given (queries, keys), with a gap of unused rows before each; and random q, kv in fp64."""
    spans, num_q, num_k = [], 0, 0
    q_positions, k_positions = [], []
    for queries, keys in lengths:
        num_q, num_k = num_q + 1, num_k + 2
        spans.append(Span(num_q, num_q + queries, num_k, num_k + keys))
        q_positions += [0, *range(offset + keys - queries, offset + keys)]
        k_positions += [0, 0, *range(0, 2 * keys, 2)] if window and not causal else [0, 0, *range(keys)]
        num_q, num_k = num_q + queries, num_k + keys
    work = Work(
        tuple(spans),
        causal,
        heads,
        head_dim,
        scale=0.3,
        num_queries=num_q,
        window=window,
        q_positions=torch.tensor(q_positions) if window else None,
        k_positions=torch.tensor(k_positions) if window else None,
    )
    generator = torch.Generator().manual_seed(num_q * 100 + num_k)
    q = torch.randn(num_q, heads.num_heads, head_dim, generator=generator, dtype=torch.float64)
    kv_heads = heads.kv_index()[-1] + 1
    kv = torch.randn(num_k, 2, kv_heads, head_dim, generator=generator, dtype=torch.float64)
    return work, q * 2, kv


def differences(a: AttentionState, b: AttentionState) -> tuple[float, float]:
    """Of out, and of lse where keys were seen; both must agree on where none were."""
    blind = b.lse == -math.inf
    assert torch.equal(a.lse == -math.inf, blind)
    assert a.out[blind].eq(0).all() and not a.out.isnan().any()
    lse = (a.lse - b.lse).masked_fill(blind, 0.0)
    return float((a.out - b.out).abs().max()), float(lse.abs().max())


def compare(name: str, work: Work, q: torch.Tensor, kv: torch.Tensor, dtype: torch.dtype) -> tuple[float, float]:
    q, kv = q.to(dtype), kv.to(dtype)
    state = get_kernel(name)(work)(q, kv)
    assert state.out.dtype == state.lse.dtype == torch.float32
    return differences(state, get_kernel("reference")(work)(q.double(), kv.double()))


HEAD_MAPS = [HeadMap(0, 4, 1), HeadMap(0, 8, 4), HeadMap(2, 4, 8), HeadMap(4, 8, 3), HeadMap(1, 8, 3)]
LENGTHS = [
    [(1, 1)] * 5,
    [(4, 9)] * 3,
    [(7, 3)] * 2,
    [(40, 40)],
    [(1, 300)],
    [(5, 70), (1, 1), (0, 9), (9, 0), (17, 33)],
    [(30, 7)],
    [],
    [(0, 0)],
]


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("heads", HEAD_MAPS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_ragged_spans_masks_and_heads(name: str, heads: HeadMap, causal: bool, lengths: list[tuple[int, int]]) -> None:
    work, q, kv = make_work(lengths, heads=heads, causal=causal)
    if not len(q):
        state = get_kernel(name)(work)(q.float(), kv.float())
        assert state.out.shape == (0, heads.num_heads, 16)
        return
    out, lse = compare(name, work, q, kv, torch.float32)
    assert out < 1e-5 and lse < 1e-5


@pytest.mark.parametrize("name", FAST)
@settings(max_examples=60, deadline=None)
@given(
    queries=st.integers(1, 600),
    keys=st.integers(1, 700),
    window=st.integers(1, 400),
    offset=st.integers(-50, 400),
    causal=st.booleans(),
)
def test_windows_by_position(name: str, queries: int, keys: int, window: int, offset: int, causal: bool) -> None:
    work, q, kv = make_work(
        [(queries, keys), (1, 5)], heads=HeadMap(0, 4, 2), causal=causal, window=window, offset=offset
    )
    out, lse = compare(name, work, q, kv, torch.float32)
    assert out < 1e-5 and lse < 1e-5


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("head_dim", [2, 24, 64, 80, 128])
def test_head_dims(name: str, head_dim: int) -> None:
    work, q, kv = make_work([(50, 50), (1, 200)], heads=HeadMap(0, 4, 2), head_dim=head_dim, causal=True)
    out, lse = compare(name, work, q, kv, torch.float32)
    assert out < 1e-5 and lse < 1e-5


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("keys", [5, 16, 33])
def test_rows_of_many_wide_kv_heads(name: str, keys: int) -> None:
    work, q, kv = make_work([(1, keys)] * 2, heads=HeadMap(0, 64, 1), head_dim=128, causal=True)
    out, lse = compare(name, replace(work, scale=128**-0.5), q, kv, torch.float32)
    assert out < 1e-5 and lse < 1e-5


@pytest.mark.skipif(CHOSEN != "native", reason=WHY)
@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 1500)), min_size=1, max_size=4),
    heads=st.sampled_from(HEAD_MAPS),
    head_dim=st.sampled_from([64, 80, 96, 128, 192, 256]),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 900),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_native_ragged_batches(
    lengths: list[tuple[int, int]],
    heads: HeadMap,
    head_dim: int,
    causal: bool,
    window: int | None,
    dtype: torch.dtype,
) -> None:
    work, q, kv = make_work(lengths, heads=heads, head_dim=head_dim, causal=causal, window=window)
    out, lse = compare("native", replace(work, scale=head_dim**-0.5), q / 2, kv, dtype)
    assert out < (2e-2 if dtype == torch.bfloat16 else 1e-5) and lse < 1e-5


@pytest.mark.skipif(CHOSEN != "native", reason=WHY)
@pytest.mark.parametrize("lengths", [[(1, 5000)], [(1, 2500), (3, 2100)], [(300, 700), (1, 9)]], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_native_on_several_threads(lengths: list[tuple[int, int]], dtype: torch.dtype) -> None:
    work, q, kv = make_work(lengths, heads=HeadMap(0, 8, 4), head_dim=64, causal=True)
    torch.set_num_threads(3)
    try:
        out, lse = compare("native", replace(work, scale=0.125), q / 2, kv, dtype)
    finally:
        torch.set_num_threads(1)
    assert out < (2e-2 if dtype == torch.bfloat16 else 1e-5) and lse < 1e-5


@pytest.mark.skipif(CHOSEN != "native", reason=WHY)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_native_is_no_less_exact_than_torch(head_dim: int, causal: bool) -> None:
    work, q, kv = make_work([(500, 500)], heads=HeadMap(0, 8, 4), head_dim=head_dim, causal=causal)
    work = replace(work, scale=head_dim**-0.5)
    ours, theirs = (compare(name, work, q / 2, kv, torch.bfloat16) for name in ("native", "torch_cpu"))
    assert ours[0] <= 1.05 * theirs[0] and ours[1] < 1e-5


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [[(1, 3000)], [(3, 999), (16, 40)], [(300, 300)]], ids=str)
def test_low_precision_inputs_keep_an_exact_lse(name: str, dtype: torch.dtype, lengths: list[tuple[int, int]]) -> None:
    """Scores rounded to bf16 would give an lse error above 1e-3: too much to merge on."""
    work, q, kv = make_work(lengths, heads=HeadMap(0, 8, 4), head_dim=64, causal=lengths[0][0] == lengths[0][1])
    out, lse = compare(name, work, q, kv, dtype)
    assert out < 3 * torch.finfo(dtype).eps and lse < 2e-4


@pytest.mark.parametrize("name", [*FAST, "reference"])
def test_rows_that_see_nothing_are_zero_and_minus_infinity(name: str) -> None:
    work, q, kv = make_work([(9, 0), (4, 2)], heads=HeadMap(0, 2, 1), causal=True)
    state = get_kernel(name)(work)(q.float(), kv.float())
    blind = [*range(13), 14 - 2]  # gaps, the span without keys, and queries before the first of two keys
    assert state.out[blind].eq(0).all() and state.lse[blind].eq(-math.inf).all()
    assert state.lse[-2:].isfinite().all()


@pytest.mark.parametrize("name", FAST)
def test_strided_views_are_read_where_they_lie(name: str) -> None:
    work, q, kv = make_work([(20, 20)], heads=HeadMap(0, 4, 2), causal=True)
    wide_q = torch.zeros(len(q), 9, 16).copy_(0 * q[:, :1].float())
    wide_kv = torch.zeros(len(kv), 2, 7, 16)
    wide_q[:, 3:7], wide_kv[:, :, 2:4] = q.float(), kv.float()
    state = get_kernel(name)(work)(wide_q[:, 3:7], wide_kv[:, :, 2:4])
    assert max(differences(state, get_kernel("reference")(work)(q, kv))) < 1e-5


@pytest.mark.parametrize("name", [*FAST, "reference"])
@pytest.mark.parametrize("heads", HEAD_MAPS, ids=str)
@pytest.mark.parametrize("lengths", [[(4, 9)] * 3, [(5, 70), (1, 1), (0, 9), (9, 0)], [(30, 7)], [(1, 300)]], ids=str)
def test_a_result_is_folded_into_a_given_state(name: str, heads: HeadMap, lengths: list[tuple[int, int]]) -> None:
    """Which may be rows and heads of a larger one; rows that see nothing stay as they were, bit for bit."""
    work, q, kv = make_work(lengths, heads=heads, causal=True)
    generator = torch.Generator().manual_seed(1)
    shape = len(q) + 2, heads.num_heads + 3, 16
    larger = AttentionState(torch.randn(shape, generator=generator), torch.randn(shape[:2], generator=generator))
    larger.lse[::2] = -math.inf
    larger.out[::2] = 0.0
    into = larger.rows(1, 1 + len(q)).heads(2, 2 + heads.num_heads)
    before = AttentionState(larger.out.clone(), larger.lse.clone())
    alone = get_kernel("reference")(work)(q.float(), kv.float())
    want = into.merge(alone)
    assert get_kernel(name)(work)(q.float(), kv.float(), into) is into
    assert max(differences(into, want)) < 1e-5
    touched = torch.zeros(larger.lse.shape, dtype=torch.bool)
    touched[1:-1, 2:-1] = alone.lse != -math.inf
    assert torch.equal(larger.out[~touched], before.out[~touched])
    assert torch.equal(larger.lse[~touched], before.lse[~touched])


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("merge", [False, True])
def test_spans_that_start_at_the_same_key(name: str, causal: bool, merge: bool) -> None:
    """As the two chunks of a zigzag rank do: one sees as many keys as the other, fewer, or none."""
    heads, ends = HeadMap(0, 4, 2), [700, 1300, 1300, 40, 0]
    spans = [Span(200 * i, 200 * (i + 1), 3, 3 + end) for i, end in enumerate(ends)] + [Span(1000, 1150, 0, 90)]
    work = Work(tuple(spans), causal, heads, 16, scale=0.3, num_queries=1150)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1150, 4, 16, generator=generator, dtype=torch.float64)
    kv = torch.randn(1303, 2, 2, 16, generator=generator, dtype=torch.float64)
    into = AttentionState(torch.randn(1150, 4, 16, generator=generator), torch.randn(1150, 4, generator=generator))
    alone = get_kernel("reference")(work)(q.float(), kv.float())
    want = into.merge(alone) if merge else alone
    state = get_kernel(name)(work)(q.float(), kv.float(), into, merge)
    assert max(differences(state, want)) < 1e-5


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("lse", [-1000.0, 1000.0])
def test_a_result_far_above_or_below_a_given_state(name: str, lse: float) -> None:
    work, q, kv = make_work([(200, 300)], heads=HeadMap(0, 4, 2))
    into = AttentionState(torch.ones(len(q), 4, 16), torch.full((len(q), 4), lse))
    alone = get_kernel("reference")(work)(q.float(), kv.float())
    want = into.merge(alone)
    assert max(differences(get_kernel(name)(work)(q.float(), kv.float(), into), want)) < 2e-4


@pytest.mark.parametrize("name", [*FAST, "reference"])
@pytest.mark.parametrize("lengths", [[(4, 9)] * 3, [(5, 70), (1, 1), (0, 9), (9, 0)], [(30, 7)], [(1, 300)]], ids=str)
@pytest.mark.parametrize("heads", HEAD_MAPS, ids=str)
def test_a_given_state_can_be_overwritten(name: str, heads: HeadMap, lengths: list[tuple[int, int]]) -> None:
    """Whatever was in its memory: rows that see nothing, and those of no span, are empty then."""
    work, q, kv = make_work(lengths, heads=heads, causal=True)
    shape = len(q), heads.num_heads
    into = AttentionState(torch.full((*shape, 16), torch.nan), torch.full(shape, torch.nan))
    assert get_kernel(name)(work)(q.float(), kv.float(), into, merge=False) is into
    assert max(differences(into, get_kernel("reference")(work)(q, kv))) < 1e-5


@pytest.mark.parametrize("name", [*FAST, "reference"])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("lengths", [[(4, 9)] * 3, [(5, 70), (1, 1), (0, 9), (9, 0)], [(1, 300)]], ids=str)
def test_keys_are_read_at_the_rows_where_they_lie(
    name: str, window: int | None, lengths: list[tuple[int, int]]
) -> None:
    work, q, kv = make_work(lengths, heads=HeadMap(0, 8, 4), window=window, causal=True)
    generator = torch.Generator().manual_seed(2)
    rows = torch.randperm(3 * len(kv), generator=generator)[: len(kv)]
    pages = torch.full((3 * len(kv), *kv.shape[1:]), torch.nan)
    pages[rows] = kv.float()
    state = get_kernel(name)(replace(work, k_rows=rows))(q.float(), pages)
    assert max(differences(state, get_kernel("reference")(work)(q, kv))) < 1e-5


def test_head_maps_are_cut_into_uniform_runs() -> None:
    assert HeadMap(0, 12, 3).runs() == [HeadRun(0, 12, 0, 4)]
    assert HeadMap(4, 8, 3).runs() == [HeadRun(0, 4, 0, 2)]  # two heads of each of two cut groups
    assert HeadMap(0, 4, 3).runs() == [HeadRun(0, 3, 0, 1), HeadRun(3, 4, 1, 2)]
    assert HeadMap(2, 4, 8).runs() == [HeadRun(0, 2, 0, 1)]
    assert HeadMap(2, 4, 8).kv_index() == [0, 0]


def test_an_unknown_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown kernel 'magic'; known: reference, torch_cpu"):
        get_kernel("magic")
