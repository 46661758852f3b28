"""Tiny random checkpoints of every family, in the format of real ones, and transformers as their oracle.

Random weights as initialised would hide errors: attention would be nearly uniform and the best two logits
nearly equal. Here attention scores spread by 2 or more and logits by 1 or more (see test_decoder.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

HEAD_DIM = 16
VOCAB_SIZE = 509  # prime: no number of ranks divides it
WINDOW = 24
END, START, TURN = "<|end|>", "<|start|>", "<|turn|>"

CHAT_TEMPLATE = (
    "{{ '<|start|>' }}{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}"
    "{{ '<|turn|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

TRAINING_TEXT = [
    "A long prompt is cut into pieces, and every rank computes the attention of its own piece.",
    "The keys and values travel around a ring until each query has seen all of them.",
    "Partial results are merged by the logarithm of their sums, so that nothing is counted twice.",
    "def attention(query, key, value):\n    return softmax(query @ key.T / scale) @ value\n",
    "Rank zero sends its block to rank one, while rank three waits for the last block of this round.",
    '{"model": "tiny", "messages": [{"role": "user", "content": "Hello, world!"}]}',
    "Größe, naïve, 東京, 🚀 and other text that is not ASCII.",
]


@dataclass(frozen=True)
class Family:
    config: type[PretrainedConfig]
    fields: dict[str, Any] = field(default_factory=dict)
    head_dim: int | None = None  # None: hidden_size / num_heads
    jinja_file: bool = True  # the chat template has its own file, or is a field of tokenizer_config.json


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}

FAMILIES = {
    "llama2": Family(LlamaConfig, jinja_file=False),
    "llama3": Family(LlamaConfig, {"rope_parameters": LLAMA3_ROPE, "rms_norm_eps": 1e-5}),
    "qwen2": Family(Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": Family(Qwen3Config, head_dim=24),
    "mistral": Family(MistralConfig, {"sliding_window": WINDOW}, jinja_file=False),
}


def make_checkpoint(
    folder: Path,
    family: str | Family,
    *,
    num_heads: int = 12,
    num_kv_heads: int = 4,
    num_layers: int = 3,
    hidden_size: int | None = None,
    max_position_embeddings: int = 8192,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    seed: int = 0,
    head: bool = True,
    **fields: Any,
) -> Path:
    """Writes config, weights, tokenizer and chat template; `fields` override those of config.json.

    head: False saves the inner model, as embedding models are: other architecture, names without "model.".
    """
    kind = FAMILIES[family] if isinstance(family, str) else family
    tokenizer = _train_tokenizer()
    end, turn = tokenizer.token_to_id(END), tokenizer.token_to_id(TURN)
    hidden_size = hidden_size or num_heads * HEAD_DIM
    values: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size + 1,  # odd: splits unevenly
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "max_position_embeddings": max_position_embeddings,
        "bos_token_id": tokenizer.token_to_id(START),
        "eos_token_id": [end, turn],
    }
    if kind.head_dim is not None:
        values["head_dim"] = kind.head_dim
    config = kind.config(**(values | kind.fields | fields))
    model = AutoModelForCausalLM.from_config(config)
    _randomize(model, seed)
    saved = model if head else model.base_model
    saved.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=START, eos_token=END, chat_template=CHAT_TEMPLATE
    ).save_pretrained(folder, save_jinja_files=kind.jinja_file)
    return folder


def oracle_logits(folder: Path, tokens: list[int]) -> torch.Tensor:
    """fp32 logits [tokens, vocab] of eager attention in fp32."""
    with torch.inference_mode():
        return _oracle(folder)(torch.tensor([tokens])).logits[0].float()


def oracle_states(folder: Path, tokens: list[int], causal: bool = True) -> torch.Tensor:
    """fp32 final hidden states [tokens, hidden], normed; causal False: every token sees all others."""
    model = AutoModel.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()
    mask = None if causal else torch.zeros(1, 1, len(tokens), len(tokens))
    with torch.inference_mode():
        states: torch.Tensor = model(torch.tensor([tokens]), attention_mask=mask).last_hidden_state[0]
    return states


def oracle_greedy(folder: Path, tokens: list[int], num_tokens: int) -> list[int]:
    """The `num_tokens` most likely continuations, one after the other; end-of-sequence does not stop it."""
    model, cache, chosen, new = _oracle(folder), None, [], list(tokens)
    with torch.inference_mode():
        for _ in range(num_tokens):
            result = model(torch.tensor([new]), past_key_values=cache, use_cache=True)
            cache, new = result.past_key_values, [int(result.logits[0, -1].argmax())]
            chosen += new
    return chosen


def _oracle(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()


def _train_tokenizer() -> Tokenizer:
    """Byte-level BPE of exactly VOCAB_SIZE tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END, START, TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, tokenizer.get_vocab_size()
    return tokenizer


@torch.no_grad()
def _randomize(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tied = model.config.tie_word_embeddings
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            parameter.copy_(1.6 + 0.3 * noise)
        elif name == "model.norm.weight":
            parameter.copy_((6.0 if tied else 2.0) * (1.0 + 0.3 * noise))
        elif name.endswith("norm.weight"):
            parameter.copy_(1.0 + 0.3 * noise)
        elif name.endswith("bias"):
            parameter.copy_(0.2 * noise)
        elif name.endswith("embed_tokens.weight"):
            # a tied embedding of unit scale would make tokens predict themselves
            parameter.copy_(0.1 * noise if tied else noise)
        else:
            gain = 1.6 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1.0
            gain = 4.0 if name.endswith("lm_head.weight") else gain
            parameter.copy_(noise * gain / parameter.shape[-1] ** 0.5)
