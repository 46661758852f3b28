"""What is read from a Hugging Face folder, what is refused and how the refusal reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sp_backend.models.config import ModelConfig, check_parallel
from sp_backend.models.layers import inverse_frequencies
from sp_backend.models.rope_config import Rope
from sp_backend.parallel import Shard

LLAMA_2 = {  # as published: no rope_parameters, no head_dim
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
LLAMA_3_1 = LLAMA_2 | {
    "eos_token_id": [128001, 128008, 128009],
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
QWEN_2_5 = LLAMA_2 | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "num_hidden_layers": 28,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "rope_theta": 1000000.0,
    "torch_dtype": "bfloat16",
}
QWEN_3 = QWEN_2_5 | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 128,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
    "sliding_window": None,
}
MISTRAL = LLAMA_2 | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "num_key_value_heads": 8,
    "sliding_window": 4096,
    "max_position_embeddings": 32768,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
PUBLISHED = {
    "llama 2": LLAMA_2,
    "llama 3.1": LLAMA_3_1,
    "qwen 2.5": QWEN_2_5,
    "qwen 2.5 yarn": QWEN_2_5 | {"rope_scaling": YARN},
    "yarn beyond the last dim": QWEN_2_5
    | {"rope_scaling": YARN | {"original_max_position_embeddings": 1500}, "rope_theta": 10.0},
    "qwen 2.5 windowed": QWEN_2_5 | {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 20},
    "qwen 3": QWEN_3,
    "mistral": MISTRAL,
    "mistral nemo": MISTRAL | {"sliding_window": None, "head_dim": 128, "hidden_size": 5120},
    "linear": LLAMA_2 | {"rope_scaling": {"type": "linear", "factor": 2.0}},
}


def write(folder: Path, config: dict[str, Any], generation: dict[str, Any] | None = None) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_mean_what_transformers_makes_of_them(name, tmp_path):
    config = ModelConfig.load(write(tmp_path, PUBLISHED[name]))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert config.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert config.num_kv_heads == theirs.num_key_value_heads
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * theirs.num_hidden_layers
    window = getattr(theirs, "sliding_window", None)
    assert list(config.windows) == [window if kind == "sliding_attention" else None for kind in kinds]
    assert config.tie_word_embeddings == theirs.tie_word_embeddings
    assert config.rms_norm_eps == theirs.rms_norm_eps
    assert getattr(torch, config.dtype) == theirs.dtype
    ends = theirs.eos_token_id
    assert list(config.eos_ids) == (ends if isinstance(ends, list) else [ends])


@pytest.mark.parametrize("name", PUBLISHED)
def test_rope_frequencies_equal_transformers(name, tmp_path):
    config = ModelConfig.load(write(tmp_path, PUBLISHED[name]))
    theirs = AutoConfig.from_pretrained(tmp_path)
    theirs.num_hidden_layers, theirs.vocab_size, theirs.intermediate_size = 1, 8, 8
    if getattr(theirs, "layer_types", None):
        theirs.layer_types = theirs.layer_types[:1]
    rotary = AutoModelForCausalLM.from_config(theirs).model.rotary_emb
    inv_freq, scale = inverse_frequencies(config.rope, config.head_dim)
    assert torch.equal(inv_freq, rotary.inv_freq)
    assert scale == rotary.attention_scaling


def test_both_spellings_of_rope_are_read(tmp_path):
    old = ModelConfig.load(write(tmp_path, LLAMA_3_1))
    parameters = LLAMA_3_1["rope_scaling"] | {"rope_theta": 500000.0}
    new = {name: value for name, value in LLAMA_3_1.items() if not name.startswith("rope_")}
    assert ModelConfig.load(write(tmp_path, new | {"rope_parameters": parameters})) == old
    assert old.rope == Rope("llama3", 500000.0, 8.0, 8192, 1.0, 4.0)


def test_yarn_extends_the_positions_of_the_file(tmp_path):
    assert ModelConfig.load(write(tmp_path, PUBLISHED["qwen 2.5 yarn"])).max_position_embeddings == 131072


def test_generation_config_knows_the_ends_of_sequences(tmp_path):
    assert ModelConfig.load(write(tmp_path, LLAMA_2)).eos_ids == (2,)
    assert ModelConfig.load(write(tmp_path, LLAMA_2, {"temperature": 0.6})).eos_ids == (2,)
    assert ModelConfig.load(write(tmp_path, LLAMA_2, {"eos_token_id": [7, 9]})).eos_ids == (7, 9)


def test_ends_beyond_the_vocabulary_are_left_out(tmp_path):
    """min_tokens bans them, which needs their logits."""
    assert ModelConfig.load(write(tmp_path, LLAMA_2 | {"eos_token_id": [2, 32000]})).eos_ids == (2,)


def test_qwen2_has_biases_on_q_k_and_v_alone_whatever_the_file_says(tmp_path):
    config = ModelConfig.load(write(tmp_path, QWEN_2_5 | {"attention_bias": True}))
    assert (config.qkv_bias, config.o_bias) == (True, False)


def test_defaults_of_absent_fields(tmp_path):
    absent = ("num_key_value_heads", "torch_dtype", "eos_token_id", "tie_word_embeddings", "architectures")
    config = ModelConfig.load(write(tmp_path, {k: v for k, v in LLAMA_2.items() if k not in absent}))
    assert (config.num_kv_heads, config.dtype, config.eos_ids) == (32, "float32", ())
    assert not config.tie_word_embeddings
    assert config.architecture == "LlamaForCausalLM"
    assert config.rope == Rope(theta=10000.0)


SCALED = LLAMA_3_1["rope_scaling"]
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": (
        {"architectures": ["MixtralForCausalLM"]},
        r'"architectures" is .Mixtral.*LlamaForCausalLM, Mistral.*Qwen2.*Qwen3',
    ),
    "no architecture": ({"architectures": None, "model_type": "gpt2"}, r'"architectures" is None.*Llama'),
    "missing field": ({"hidden_size": None}, r'"hidden_size" is missing'),
    "wrong type": ({"num_hidden_layers": "32"}, r"\"num_hidden_layers\" is '32'; expected a positive integer"),
    "zero": ({"vocab_size": 0}, r'"vocab_size" is 0; expected a positive integer'),
    "boolean as number": ({"rms_norm_eps": True}, r'"rms_norm_eps" is True; expected a positive number'),
    "kv heads": ({"num_key_value_heads": 5}, r'"num_key_value_heads" is 5; expected a divisor of 32'),
    "head size": ({"num_attention_heads": 30, "num_key_value_heads": 30}, r'"hidden_size" is 4096; expected a mult'),
    "odd head": ({"head_dim": 17}, r'"head_dim" is 17; expected an even'),
    "activation": ({"hidden_act": "gelu"}, r"\"hidden_act\" is 'gelu'; expected silu"),
    "quantized": ({"quantization_config": {"bits": 4}}, r'"quantization_config" is .*expected unquantized'),
    "dtype": ({"torch_dtype": "float8"}, r"\"torch_dtype\" is 'float8'; expected one of float32, bfloat16, fl"),
    "rope type": (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        r"\"rope_scaling.rope_type\" is 'dynamic'; expected one of default, linear, llama3, yarn",
    ),
    "rope section": ({"rope_scaling": 8}, r'"rope_scaling" is 8; expected an object'),
    "rope factor": ({"rope_scaling": SCALED | {"factor": None}}, r'"rope_scaling.factor" is missing'),
    "rope blend": ({"rope_scaling": SCALED | {"low_freq_factor": 4.0}}, r'low_freq_factor" is 4.0; expected less'),
    "partial rope": ({"rope_scaling": {"partial_rotary_factor": 0.5}}, r'partial_rotary_factor" is 0.5'),
    "mscale": ({"rope_scaling": YARN | {"mscale": 1.0}}, r'mscale" is .*without mscale'),
    "end ids": ({"eos_token_id": "</s>"}, r"\"eos_token_id\" is '</s>'; expected a token id"),
    "bias flag": ({"attention_bias": "no"}, r"\"attention_bias\" is 'no'; expected true or false"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_file_and_field(case, tmp_path):
    fields, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as refusal:
        ModelConfig.load(write(tmp_path, LLAMA_2 | fields))
    assert str(tmp_path / "config.json") in str(refusal.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_types": ["full_attention"]}, r'"layer_types" is .*expected 28 of'),
        ({"max_window_layers": -1}, r'"max_window_layers" is -1; expected a number of layers'),
        ({"sliding_window": 0}, r'"sliding_window" is 0; expected a positive integer'),
    ],
)
def test_refused_windows(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ModelConfig.load(write(tmp_path, QWEN_2_5 | {"use_sliding_window": True} | fields))


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        ModelConfig.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"config.json: cannot be read: No such file"):
        ModelConfig.load(tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_size": 12')
    with pytest.raises(ValueError, match=r"config.json: is not valid JSON"):
        ModelConfig.load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config.json: expected a JSON object, found list"):
        ModelConfig.load(tmp_path)
    write(tmp_path, LLAMA_2)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config.json: is not valid JSON"):
        ModelConfig.load(tmp_path)


@pytest.mark.parametrize("layout", ["tokens", "heads"])
def test_parallel_sizes_that_divide_the_heads_pass(layout, tmp_path):
    config = ModelConfig.load(write(tmp_path, QWEN_2_5))  # 28 query heads, 4 KV heads
    for tp_size in (1, 2, 4):
        check_parallel(config, tp_size, 7, layout)
    check_parallel(config, 1, 5, "tokens")


def test_other_parallel_sizes_are_refused_with_those_that_fit(tmp_path):
    config = ModelConfig.load(write(tmp_path, QWEN_2_5))
    with pytest.raises(ValueError, match=r"--tp-size 7 .*28 query heads and 4 KV heads; sizes that fit: 1, 2, 4"):
        check_parallel(config, 7, 1, "tokens")
    with pytest.raises(ValueError, match=r"--sp-size 4 with --sp-layout heads .*14 query.*sizes that fit: 1, 2, 7, 14"):
        check_parallel(config, 2, 4, "heads")


@pytest.mark.parametrize("layout", ["tokens", "heads"])
@pytest.mark.parametrize(("tp_size", "sp_size"), [(1, 1), (2, 1), (1, 3), (2, 3), (4, 2)])
def test_shards_of_a_group_cover_everything_once(tp_size, sp_size, layout):
    shards = [Shard.of_rank(rank, tp_size, sp_size, layout) for rank in range(tp_size * sp_size)]
    assert [shard.rank for shard in shards] == list(range(len(shards)))
    for shard in shards:
        group = [shards[rank] for rank in shard.group_ranks()]
        assert [peer.group_rank for peer in group] == list(range(shard.group_size))
        assert [head for peer in group for head in peer.query_heads(24)] == list(range(24))
        assert [row for peer in group for row in peer.split(509)] == list(range(509))
        assert [len(peer.split(509)) for peer in group] == shard.split_sizes(509)
        in_tp = [peer.kv_heads(8) for peer in shards if peer.sp_rank == shard.sp_rank]
        assert [head for heads in in_tp for head in heads] == list(range(8))
        if layout == "heads":  # the KV heads that its query heads read are on the rank
            assert {head // 3 for head in shard.query_heads(24)} <= set(shard.kv_heads(8))
