"""Rotary position embedding, as config.json describes it. Pure: no torch.

transformers 5 writes `rope_parameters`; older files write `rope_theta` and `rope_scaling`. Both are read.
"""

from __future__ import annotations

from dataclasses import dataclass

from sp_backend.models.fields import Fields

KINDS = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class Rope:
    """Scaling fields matter only to the kinds that name them in `read_rope`."""

    kind: str = "default"  # one of KINDS
    theta: float = 10000.0
    factor: float = 1.0
    original_max_positions: int = 0  # positions the frequencies were trained on
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None  # None: derived from factor
    truncate: bool = True


def read_rope(config: Fields, max_positions: int) -> Rope:
    """The rope of a config.json. Scaling parameters win over the file's own fields, as in transformers."""
    scaling = config.section("rope_scaling") or config.section("rope_parameters")
    if scaling is None:
        return Rope(theta=config.number("rope_theta", 10000.0))
    theta = scaling.number("rope_theta", config.number("rope_theta", 10000.0))
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    partial = scaling.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise scaling.error("partial_rotary_factor", partial, "1.0 (rotation of the whole head)")
    if kind not in KINDS:
        raise scaling.error("rope_type", kind, f"one of {', '.join(KINDS)}")
    if kind == "default":
        return Rope(theta=theta)
    factor = scaling.number("factor")
    if kind == "linear":
        return Rope(kind, theta, factor)
    original = scaling.integer("original_max_position_embeddings", max_positions)
    if kind == "llama3":
        low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
        if low >= high:
            raise scaling.error("low_freq_factor", low, f"less than high_freq_factor ({high})")
        return Rope(kind, theta, factor, original, low, high)
    if scaling.present("mscale") or scaling.present("mscale_all_dim"):
        raise scaling.error("mscale", "given", "yarn without mscale and mscale_all_dim")
    return Rope(
        kind,
        theta,
        factor,
        original,
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        attention_factor=scaling.number("attention_factor") if scaling.present("attention_factor") else None,
        truncate=scaling.flag("truncate", True),
    )
