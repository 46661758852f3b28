"""Plans as arrays: the same instructions as the objects, whoever wrote them."""

import numpy as np
import pytest

from sp_backend.columns import Columns, Draft, Rounds, columns_of, mask_table
from sp_backend.layout import CAUSAL, EMPTY, FULL, KINDS, KV, Block, Kind, Layout
from sp_backend.plan import Attend, Plan, Transfer
from sp_backend.strategies import STRATEGIES, plan_for

SIZES = {"num_heads": 12, "num_kv_heads": 4}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("history", "degree"), [("all", None), ("none", None), ("own", 2), ("own", 4), ("copies", None)]
)
def test_the_table_of_masks_is_the_layout_s(kind: Kind, causal: bool, history: str, degree: int | None) -> None:
    if kind == "heads" and degree == 2:
        degree = 4  # every sequence is spread over all ranks
    if history == "copies" and kind in ("heads", "home"):
        return
    layout = Layout(4, kind, 12, 4, causal, history, degree=degree)  # type: ignore[arg-type]
    expected = [[layout.mask(q, kv) for kv in range(layout.num_chunks)] for q in range(layout.num_new)]
    assert [[(EMPTY, CAUSAL, FULL)[m] for m in row] for row in mask_table(layout)] == expected


@pytest.mark.parametrize("name", STRATEGIES)
def test_columns_and_objects_are_the_same_plan(name: str) -> None:
    plan = plan_for(name, num_ranks=4, **SIZES)
    objects = Plan(plan.name, plan.layout, tuple(plan.rounds))
    again = columns_of(objects)
    assert objects == plan and objects.digest == plan.digest
    for mine, theirs in ((again.transfers, columns_of(plan).transfers), (again.attends, columns_of(plan).attends)):
        assert all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert Rounds(Columns(again.transfers, again.attends, again.num_rounds)) == plan.rounds


def test_a_draft_writes_a_family_of_instructions_at_a_time() -> None:
    """Chunks 0 and 3 go to the ranks above, and are attended there where the mask allows it."""
    draft, layout = Draft(Layout(2, "zigzag", 4, 2, history="none")), [0, 1]
    draft.attend([[1, 2], [0, 3]], [0, 3], round=1, rank=layout)
    draft.send(KV, [[0, 3]], round=0, src=0, dst=1, heads=([0, 2], [2, 4]))
    first, second = draft.rounds()
    blocks = [Block(KV, c, heads) for heads in ((0, 2), (2, 4)) for c in (0, 3)]
    assert first.transfers == tuple(Transfer(b, 0, 1) for b in blocks) and not first.attends
    seen = [(a.rank, a.q.chunk, a.kv.chunk, a.mask) for a in second.attends]
    assert seen == [(0, 1, 0, FULL), (0, 2, 0, FULL), (1, 0, 0, CAUSAL), (1, 3, 0, FULL), (1, 3, 3, CAUSAL)]
    assert isinstance(second.attends[0], Attend)
