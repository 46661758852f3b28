import subprocess
import sys

from sp_backend.layout import KV, STATE, Block, Layout, Q
from sp_backend.plan import Attend, Plan, Round, Transfer
from sp_backend.prune import prune
from sp_backend.strategies import STRATEGIES, plan_for, ring_pass_kv

SIZES = {"num_heads": 4, "num_kv_heads": 2}


def test_for_rank_splits_a_plan_without_loss() -> None:
    plan = plan_for("token_ring", num_ranks=4, **SIZES)
    for i, r in enumerate(plan.rounds):
        parts = [plan.for_rank(rank)[i] for rank in range(4)]
        assert sorted(map(repr, r.transfers)) == sorted(repr(t) for p in parts for t in p.sends)
        assert sorted(map(repr, r.transfers)) == sorted(repr(t) for p in parts for t in p.receives)
        assert sorted(map(repr, r.attends)) == sorted(repr(a) for p in parts for a in p.attends)


def test_table_shows_ranks_by_rounds() -> None:
    plan = plan_for("ring_pass_kv", num_ranks=2, **SIZES)
    assert plan.table().splitlines() == [
        "ring_pass_kv: layout zigzag, 2 ranks, 4:2 heads",
        "        round 0           round 1",
        "rank 0  kv0,4>1           q0: kv5",
        "        q0: kv0* kv4      q3: kv1 kv2 kv5",
        "        q3: kv0 kv3* kv4",
        "rank 1  kv1,2,5>0         q1: kv0 kv4",
        "        q1: kv1* kv5      q2: kv0 kv4",
        "        q2: kv1 kv2* kv5",
    ]
    assert "q0,1[2:4]>0" in plan_for("decode", kind="heads", num_ranks=2, **SIZES).table()


def test_digest_is_the_same_in_another_process_and_differs_between_plans() -> None:
    plans = [plan_for(n, num_ranks=2, kind=k, **SIZES) for n, s in STRATEGIES.items() for k in s.kinds]
    assert len({p.digest for p in plans}) == len(plans)
    script = (
        "from sp_backend.strategies import plan_for;"
        "print(plan_for('decode', num_ranks=2, num_heads=4, num_kv_heads=2).digest)"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", script], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert printed == {plan_for("decode", num_ranks=2, **SIZES).digest}


def test_building_and_proving_plans_needs_no_torch() -> None:
    script = (
        "import sys, sp_backend.program, sp_backend.geometry;"
        "from sp_backend.strategies import plan_for;"
        "plan_for('ring_pass_kv', num_ranks=2, num_heads=4, num_kv_heads=2);"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_prune_drops_what_no_query_sees() -> None:
    def moved(history: str) -> int:
        layout = Layout(4, "zigzag", 4, 2, history=history)  # type: ignore[arg-type]
        plan = prune(ring_pass_kv.build_down(layout))
        return sum(len(r.transfers) for r in plan.rounds)

    assert moved("none") == 24 * 3 // 4  # of 4 ranks x 3 rounds x 2 chunks
    assert moved("all") == 24 * 3 // 4 + 12


def test_prune_drops_states_nobody_computed_and_rounds_left_empty() -> None:
    layout = Layout(2, "home", 4, 2, history="none")
    q, kv = Block(Q, 0, (0, 4)), Block(KV, 0, (0, 4))
    attend = Round((), (Attend(0, q, kv, "causal"),))
    useless = Round((Transfer(q, 0, 1), Transfer(Block(STATE, 0, (0, 4)), 1, 0)), ())
    assert prune(Plan("p", layout, (useless, attend, useless))).rounds == (attend,)
