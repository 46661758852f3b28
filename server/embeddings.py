"""`/v1/embeddings`: texts or token ids in, vectors of length 1 out."""

from __future__ import annotations

import base64
import json
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scheduler.request import GenerateRequest, Output
from server.config import ServerConfig
from server.errors import NO_RETRY, ApiError, invalid, too_long
from server.generation import Generator
from server.openai_types import EmbeddingRequest
from server.prompts import Prompt, PromptReader
from server.tokenizer import Tokenizer

MAX_INPUTS = 2048  # of one request, as OpenAI's


@dataclass(frozen=True, slots=True)
class EmbeddingJob:
    """What one HTTP request asks for, checked."""

    id: str
    inputs: list[list[int]]
    dimensions: int | None  # None: all
    base64: bool  # or a list of numbers
    rid: str | None
    explain: bool


class Embedder:
    """Every check that needs the model is here; errors name the field."""

    def __init__(
        self,
        config: ServerConfig,
        tokenizer: Tokenizer,
        generator: Generator,
        max_request_tokens: int,
    ) -> None:
        self._config = config
        self._generator = generator
        self._max_request_tokens = max_request_tokens
        self._inputs = PromptReader(tokenizer, config.model.vocab_size, "input")
        self._appended = appended_eos(config.text.tokenizer_path, tokenizer)

    async def read(self, body: EmbeddingRequest, explain: bool = False) -> EmbeddingJob:
        size = self._config.model.hidden_size
        if body.dimensions is not None and body.dimensions > size:
            raise invalid(f"dimensions: the model's embeddings have {size}, not {body.dimensions}.", "dimensions")
        inputs = await self._inputs.read(body.input)
        if len(inputs) > MAX_INPUTS:
            raise invalid(f"input: {len(inputs)} inputs in one request; at most {MAX_INPUTS} are taken.", "input")
        fits = self._max_request_tokens
        return EmbeddingJob(
            id=f"embd-{uuid.uuid4().hex}",
            inputs=[self._ids(prompt, fits) for prompt in inputs],
            dimensions=body.dimensions,
            base64=body.encoding_format == "base64",
            rid=body.rid,
            explain=explain,
        )

    async def run(self, job: EmbeddingJob, model: str) -> dict[str, Any]:
        """The response. Cancelling it aborts what still runs."""
        requests = [
            GenerateRequest(f"{job.id}-{i}", ids, 0, explain=job.explain, pooling=self._config.pooling)
            for i, ids in enumerate(job.inputs)
        ]
        outputs = await self._generator.embed(job.id, job.rid, requests)
        num_tokens = sum(map(len, job.inputs))
        answer: dict[str, Any] = {
            "object": "list",
            "data": [_entry(job, index, output) for index, output in enumerate(outputs)],
            "model": model,
            "usage": {
                "prompt_tokens": num_tokens,
                "total_tokens": num_tokens,
                "prompt_tokens_details": {"cached_tokens": sum(output.cached_tokens for output in outputs)},
            },
        }
        if job.explain:
            steps = [[asdict(step) for step in output.steps] for output in outputs]
            answer["sp_explain"] = [{"index": index, "steps": own} for index, own in enumerate(steps)]
        return answer

    async def probe(self, length: int) -> None:
        """Runs an input of some length through the whole model."""
        ids = [index % self._config.model.vocab_size for index in range(length)]
        await self.run(EmbeddingJob(f"probe-{uuid.uuid4().hex}", [ids], None, False, None, False), "")

    def _ids(self, prompt: Prompt, fits: int) -> list[int]:
        if prompt.text == "":
            raise invalid("input: an empty string cannot be embedded.", "input")
        ids = prompt.ids
        if prompt.text is not None and self._appended is not None:
            ids = [*ids, self._appended]
        if len(ids) > fits:
            raise too_long(len(ids), fits, "input", self._how_to_fit(fits))
        return ids

    def _how_to_fit(self, fits: int) -> str:
        if fits == self._config.backend.context_length:
            return ""
        step = "" if self._config.backend.causal else " (under a full mask it is computed in one step)"
        return f" The KV cache must hold an input{step}: raise --max-total-tokens or --mem-fraction-static."


def appended_eos(folder: Path, tokenizer: Tokenizer) -> int | None:
    """The token that transformers appends to every text because of `add_eos_token`, where tokenizer.json does not."""
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    named = config.get("eos_token")
    name = named.get("content") if isinstance(named, dict) else named
    if config.get("add_eos_token") is not True or not isinstance(name, str):
        return None
    eos = tokenizer.id_of(name)
    return None if eos in tokenizer.encode("x")[-1:] else eos


def _entry(job: EmbeddingJob, index: int, output: Output) -> dict[str, Any]:
    assert output.embedding is not None
    vector = normalised(output.embedding[: job.dimensions])
    # numpy's numbers are written with as many digits as float32 has
    written: Any = base64.b64encode(vector.astype("<f4").tobytes()).decode() if job.base64 else vector
    return {"object": "embedding", "index": index, "embedding": written}


def normalised(vector: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of length 1. Raises ApiError where the model's dtype has overflown."""
    if not np.isfinite(vector).all():
        raise ApiError(500, "The embedding is not finite: --dtype float32 or bfloat16 may help.", headers=NO_RETRY)
    length = float(np.linalg.norm(vector.astype(np.float64)))
    return np.asarray(vector / max(length, 1e-12), np.float32)
