"""The plans of one server: which ones its workers build, and the planner that chooses among them. Pure: no torch.

Workers and the controller each make both from the same machine, and so come to the same; digests are compared.
"""

from __future__ import annotations

from functools import partial

from sp_backend.commands import DECODE, LOCAL
from sp_backend.config import AUTO, BackendConfig
from sp_backend.layout import Kind
from sp_backend.models.config import ModelConfig
from sp_backend.plan import Plan
from sp_backend.planner import OFF, Planner
from sp_backend.shape import ModelShape
from sp_backend.strategies import plan_for
from sp_backend.topology import Machine

SERVER_SECONDS = 4e-3  # of a request, in which the server's own process keeps a rank from its core: 2 to 4 ms were seen
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


def shape_of(config: BackendConfig, model: ModelConfig) -> ModelShape:
    """One SP group's share of the model, as a prefill runs it: of the last layer keys and values alone."""
    num_layers = max(1, model.num_layers - 1)
    kv_parameters = 2 * model.hidden_size * model.num_kv_heads * model.head_dim
    return ModelShape(
        num_heads=model.num_heads // config.tp_size,
        num_kv_heads=model.num_kv_heads // config.tp_size,
        head_dim=model.head_dim,
        num_layers=num_layers,
        itemsize=ITEMSIZE[config.dtype],
        dense_flops=2 * (num_layers * model.layer_parameters + kv_parameters) / config.tp_size,
        kv_flops=2 * model.num_layers * kv_parameters / config.tp_size,
    )


def planner_for(config: BackendConfig, model: ModelConfig, machine: Machine | None) -> Planner | None:
    """None where there is nothing to predict: one rank, or no machine to predict for.

    Raises ValueError if the machine has too few ranks.
    """
    if machine is None or config.sp_size == 1:
        return None
    heads = config.layout == "heads"
    return Planner(
        machine,
        shape_of(config, model),
        config.sp_size,
        layout="heads" if heads else "tokens",
        kind="heads" if heads else "zigzag",
        causal=config.causal,
        redundant_kv=config.redundant_kv,
        page_size=config.page_size,
        candidates=None if config.strategy == AUTO and not heads else [config.variant],
        delay=SERVER_SECONDS if config.takes_all_cores else 0.0,
    )


def plans_for(config: BackendConfig, model: ModelConfig, planner: Planner | None) -> dict[str, Plan]:
    """Every plan that a step may name, built and proved."""
    heads = config.layout == "heads"
    kind: Kind = "heads" if heads else "home"
    spread = [config.variant] if planner is None else planner.winners
    build = partial(
        plan_for,
        num_ranks=config.sp_size,
        num_heads=model.num_heads // config.tp_size,
        num_kv_heads=model.num_kv_heads // config.tp_size,
        causal=config.causal,
    )
    plans = {str(variant): build(variant, redundant_kv=config.redundant_kv) for variant in spread if variant != OFF}
    return plans | {DECODE: build(DECODE, kind=kind), LOCAL: build(OFF)}
