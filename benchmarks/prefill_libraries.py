"""`python prefill_libraries.py NAME FOLDER THREADS`: one peer of `benchmarks.prefill`, in its own process.

Runs in the environment of `make bench-peers`, so it imports nothing of this repository. First it prints a line of JSON,
the logits that follow the token ids 100 to 163. Then it answers each line of JSON on standard input, the token ids of a
prompt, with a line: the seconds to the first new token. Every prompt starts with an empty cache.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Prefill = Callable[[Sequence[int]], np.ndarray[Any, np.dtype[np.float32]]]  # token ids -> logits of the last position

MAX_TOKENS = 65536 + 64  # of a llama.cpp context
BATCH = 512  # tokens at a time in llama.cpp


def main() -> None:
    name, folder, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    prefill = LIBRARIES[name](folder, threads)
    print(json.dumps(prefill(range(100, 164)).tolist()), flush=True)
    for line in sys.stdin:
        prompt = json.loads(line)
        began = time.perf_counter()
        prefill(prompt).argmax()
        print(time.perf_counter() - began, flush=True)


def transformers(folder: Path, threads: int) -> Prefill:
    """sdpa is its fastest attention on a CPU; the logits of the last position alone."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa")

    @torch.inference_mode()
    def prefill(prompt: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
        output = model(torch.tensor([list(prompt)]), use_cache=True, logits_to_keep=1)
        return output.logits[0, -1].float().numpy()

    return prefill


def llama_cpp(folder: Path, threads: int) -> Prefill:
    """Weights in bf16 and KV in f16, its default and twice as fast here as KV in bf16; flash attention."""
    import llama_cpp

    file = folder / "model.gguf"
    write_gguf(folder, file)
    model = llama_cpp.Llama(
        str(file),
        n_ctx=MAX_TOKENS,
        n_batch=BATCH,
        n_ubatch=BATCH,
        n_threads=threads,
        n_threads_batch=threads,
        flash_attn=True,
        verbose=False,
    )

    def prefill(prompt: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
        model.reset()
        model.eval(list(prompt))
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model.ctx, -1), (model.n_vocab(),)).copy()

    return prefill


def write_gguf(folder: Path, file: Path) -> None:
    """The folder's Llama, without a tokenizer."""
    import gguf
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads["q_proj"])
    writer.add_head_count_kv(heads["k_proj"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config["vocab_size"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        count = heads.get(name.split(".")[-2])
        if count:  # its rotary embedding turns neighbours, not halves
            tensor = tensor.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
        kind = gguf.GGMLQuantizationType.F32 if tensor.dim() == 1 else gguf.GGMLQuantizationType.BF16
        values = gguf.quantize(tensor.float().numpy(), kind)
        writer.add_tensor(names.get_name(name, (".weight",)), values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


LIBRARIES: dict[str, Callable[[Path, int], Prefill]] = {"transformers": transformers, "llama.cpp": llama_cpp}

if __name__ == "__main__":
    main()
