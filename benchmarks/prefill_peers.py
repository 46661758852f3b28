"""The peers of `benchmarks.prefill --compare peers`: libraries on the same weights, in processes of their own."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from types import TracebackType

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.launched import ROOT
from benchmarks.peers import PYTHON
from sp_backend.models.config import ModelConfig
from sp_backend.models.weights import fill_dummy, tensor_specs
from sp_backend.parallel import Shard

PACKAGES = {"transformers": "transformers", "llama.cpp": "llama-cpp-python"}
SAME = 0.05  # relative RMS difference of two libraries' logits in bf16
SHAPE: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 12,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 32000,
    "max_position_embeddings": 131072,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def write_model(folder: Path) -> ModelConfig:
    """A Llama of random bf16 weights, with the embedded model's tokenizer for the servers."""
    (folder / "config.json").write_text(json.dumps(SHAPE))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((ROOT / "server" / "default_model" / name).read_bytes())
    model = ModelConfig.load(folder)
    specs = list(tensor_specs(model, Shard()))
    weights = {spec.name: torch.empty(spec.shape, dtype=torch.bfloat16) for spec in specs}
    fill_dummy(weights, specs)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return model


class Peer:
    """One library on `threads` threads; loaded once the context is entered, gone once it is left."""

    def __init__(self, name: str, folder: Path, threads: int = 2) -> None:
        script = Path(__file__).with_name("prefill_libraries.py")
        self._name = name
        self._command = [str(PYTHON), str(script), name, str(folder), str(threads)]

    def __str__(self) -> str:
        return self._name

    def __enter__(self) -> Peer:
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.logits = np.array(json.loads(self._answer()))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait(10)

    def time_to_first_token(self, prompt_tokens: int, seed: int) -> float:
        """Seconds that it measured itself."""
        prompt = np.random.default_rng(seed).integers(100, 32000, prompt_tokens)
        assert self._process.stdin
        print(json.dumps(prompt.tolist()), file=self._process.stdin, flush=True)
        return float(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            self._process.wait(10)
            raise RuntimeError(f"{self._name} does not run in {PYTHON.parent.parent}: see above")
        return line


def check_same_model(peers: Sequence[Peer]) -> None:
    """RuntimeError if the logits of one differ from the first's by more than bf16 explains."""
    first = peers[0].logits
    for peer in peers:
        difference = np.linalg.norm(peer.logits - first) / np.linalg.norm(first)
        if difference > SAME:
            raise RuntimeError(f"{peer} computes another model than {peers[0]}: logits differ by {difference:.1%}")


def model_flops(model: ModelConfig, tokens: int) -> float:
    """That one prefill needs: matrix products of all tokens, the pairs that causal attention sees, one row of logits;
    of the last layer, keys and values of all tokens and the rest of one.
    """
    of_pair = 4 * model.num_heads * model.head_dim
    layer = 2 * model.layer_parameters * tokens + of_pair * tokens * (tokens + 1) / 2
    keys = 4 * model.hidden_size * model.num_kv_heads * model.head_dim * (tokens - 1)
    last = keys + 2 * model.layer_parameters + of_pair * tokens
    return (model.num_layers - 1) * layer + last + 2 * model.vocab_size * model.hidden_size


def matrix_rate(size: int = 2048, repeats: int = 5) -> float:
    """FLOP/s of torch.mm in bf16 on one thread, now."""
    a = torch.randn(size, size).bfloat16()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.mm(a, a)
        return 2 * size**3 / median(_seconds(lambda: torch.mm(a, a)) for _ in range(repeats))
    finally:
        torch.set_num_threads(threads)


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
