"""What a Hugging Face folder says about a model: families are rows of a table. Pure: no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sp_backend.config import DTYPES, LAYOUTS
from sp_backend.models.checkpoint import is_bare
from sp_backend.models.fields import Fields
from sp_backend.models.rope_config import Rope, read_rope


@dataclass(frozen=True, slots=True)
class Family:
    """How the families differ. None: read from the config's `attention_bias`."""

    model_type: str
    qkv_bias: bool | None
    o_bias: bool | None
    qk_norm: bool
    windows: str  # none | all layers ("all") | `use_sliding_window` and `layer_types` ("layers")
    head_dim: int | None = None  # where config.json does not say; None: hidden_size / num_attention_heads


FAMILIES = {
    "LlamaForCausalLM": Family("llama", qkv_bias=None, o_bias=None, qk_norm=False, windows="none"),
    "MistralForCausalLM": Family("mistral", qkv_bias=False, o_bias=False, qk_norm=False, windows="all"),
    "Qwen2ForCausalLM": Family("qwen2", qkv_bias=True, o_bias=False, qk_norm=False, windows="layers"),
    "Qwen3ForCausalLM": Family("qwen3", qkv_bias=None, o_bias=None, qk_norm=True, windows="layers", head_dim=128),
}


HEAD, NO_HEAD = "ForCausalLM", "Model"  # how the architecture with a language model head is named, and that without
FAMILIES |= {name.replace(HEAD, NO_HEAD): family for name, family in FAMILIES.items()}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    architecture: str  # a key of FAMILIES
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int  # positions the model was made for, rope scaling included
    rms_norm_eps: float
    rope: Rope
    windows: tuple[int | None, ...]  # per layer: keys a query sees, itself included; None: all of them
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    eos_ids: tuple[int, ...]
    dtype: str  # of the checkpoint, one of DTYPES
    causal: bool = True  # False: made for a full mask, as bidirectional embedding models are
    has_head: bool = True  # False: it can embed, not generate

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer's projections and MLP."""
        heads = 2 * self.num_heads + 2 * self.num_kv_heads
        return self.hidden_size * (heads * self.head_dim + 3 * self.intermediate_size)

    @property
    def num_parameters(self) -> int:
        embeddings = self.vocab_size * self.hidden_size * (2 if self.has_head and not self.tie_word_embeddings else 1)
        return self.num_layers * self.layer_parameters + embeddings

    @classmethod
    def load(cls, folder: str | Path) -> ModelConfig:
        """Reads config.json and generation_config.json; ValueError names the file and the field at fault."""
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder")
        fields = Fields.load(folder / "config.json")
        architecture = _architecture(fields)
        family = FAMILIES[architecture]
        _check_supported(fields)
        num_layers = fields.integer("num_hidden_layers")
        rope, max_positions = _rope(fields)
        num_heads, num_kv_heads, head_dim = _heads(fields, family)
        bias = fields.flag("attention_bias", False)
        vocab_size = fields.integer("vocab_size")
        tied = fields.flag("tie_word_embeddings", False)
        return cls(
            architecture=architecture,
            vocab_size=vocab_size,
            hidden_size=fields.integer("hidden_size"),
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_position_embeddings=max_positions,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope=rope,
            windows=_windows(fields, family, num_layers),
            qkv_bias=bias if family.qkv_bias is None else family.qkv_bias,
            o_bias=bias if family.o_bias is None else family.o_bias,
            mlp_bias=family.model_type == "llama" and fields.flag("mlp_bias", False),
            qk_norm=family.qk_norm,
            tie_word_embeddings=tied,
            eos_ids=tuple(token for token in _eos_ids(folder, fields) if token < vocab_size),  # others are never drawn
            dtype=_dtype(fields),
            causal=fields.flag("is_causal", True) and not fields.flag("use_bidirectional_attention", False),
            # some files name the architecture with a head and have none
            has_head=architecture.endswith(HEAD) and (tied or not is_bare(folder)),
        )


def check_parallel(config: ModelConfig, tp_size: int, sp_size: int, layout: str) -> None:
    """Refuses sizes that do not divide the heads. MLP and vocabulary may split unevenly."""
    assert layout in LAYOUTS, layout
    heads, kv_heads = config.num_heads, config.num_kv_heads
    if heads % tp_size or kv_heads % tp_size:
        raise ValueError(
            f"--tp-size {tp_size} does not divide the model's {heads} query heads and {kv_heads} KV heads; "
            f"sizes that fit: {_divisors(kv_heads)}"
        )
    if layout == "heads" and heads // tp_size % sp_size:
        raise ValueError(
            f"--sp-size {sp_size} with --sp-layout heads does not divide the {heads // tp_size} query heads "
            f"that --tp-size {tp_size} leaves; sizes that fit: {_divisors(heads // tp_size)}"
        )


def _divisors(number: int) -> str:
    return ", ".join(str(size) for size in range(1, number + 1) if number % size == 0)


def _architecture(fields: Fields) -> str:
    supported = f"one of {', '.join(FAMILIES)}"
    named = fields.texts("architectures")
    if named:
        if named[0] not in FAMILIES:
            raise fields.error("architectures", named[0], supported)
        return named[0]
    model_type = fields.text("model_type", "")
    for architecture, family in FAMILIES.items():
        if family.model_type == model_type:
            return architecture
    raise fields.error("architectures", None, supported)


def _check_supported(fields: Fields) -> None:
    activation = fields.text("hidden_act", "silu")
    if activation != "silu":
        raise fields.error("hidden_act", activation, "silu")
    if fields.present("quantization_config"):
        raise fields.error("quantization_config", "given", "unquantized weights")


def _rope(fields: Fields) -> tuple[Rope, int]:
    """And the positions that the model was made for."""
    max_positions = fields.integer("max_position_embeddings")
    rope = read_rope(fields, max_positions)
    if rope.kind == "yarn":  # such files often keep the unscaled length
        max_positions = max(max_positions, round(rope.original_max_positions * rope.factor))
    return rope, max_positions


def _heads(fields: Fields, family: Family) -> tuple[int, int, int]:
    num_heads = fields.integer("num_attention_heads")
    num_kv_heads = fields.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise fields.error("num_key_value_heads", num_kv_heads, f"a divisor of {num_heads} attention heads")
    hidden_size = fields.integer("hidden_size")
    if hidden_size % num_heads and not fields.present("head_dim") and family.head_dim is None:
        raise fields.error("hidden_size", hidden_size, f"a multiple of {num_heads} attention heads")
    head_dim = fields.integer("head_dim", family.head_dim or hidden_size // num_heads)
    if head_dim % 2:
        raise fields.error("head_dim", head_dim, "an even number")
    return num_heads, num_kv_heads, head_dim


def _windows(fields: Fields, family: Family, num_layers: int) -> tuple[int | None, ...]:
    use = family.windows == "all" or (family.windows == "layers" and fields.flag("use_sliding_window", False))
    if not use or not fields.present("sliding_window"):
        return (None,) * num_layers
    window = fields.integer("sliding_window")
    if family.windows == "all":
        return (window,) * num_layers
    kinds = fields.texts("layer_types")
    if not kinds:
        first = fields.values.get("max_window_layers", 28)
        if not isinstance(first, int) or isinstance(first, bool) or first < 0:
            raise fields.error("max_window_layers", first, "a number of layers")
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if len(kinds) != num_layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise fields.error("layer_types", kinds, f"{num_layers} of full_attention or sliding_attention")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _eos_ids(folder: Path, fields: Fields) -> tuple[int, ...]:
    """Generation ends at any of these; the generation config knows more of them than config.json."""
    file = folder / "generation_config.json"
    ids = Fields.load(file).ids("eos_token_id") if file.exists() else ()
    return ids or fields.ids("eos_token_id")


def _dtype(fields: Fields) -> str:
    name = "dtype" if fields.present("dtype") else "torch_dtype"
    dtype = fields.text(name, "float32")
    if dtype not in DTYPES:
        raise fields.error(name, dtype, f"one of {', '.join(DTYPES)}")
    return dtype
