"""`python prefill_libraries.py NAME FOLDER THREADS`: one peer of `benchmarks.prefill`, in its own process.

Runs in the environment of `make bench-peers`, so it imports nothing of this repository. It says "ready", then answers
each line of JSON on standard input, the token ids of a prompt, with a line: the seconds to the first new token and the
token. Every prompt starts with an empty cache.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

FirstToken = Callable[[Sequence[int]], int]


def main() -> None:
    name, folder, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    first_token = LIBRARIES[name](folder, threads)
    first_token(range(100, 164))
    print("ready", flush=True)
    for line in sys.stdin:
        prompt = json.loads(line)
        began = time.perf_counter()
        token = first_token(prompt)
        print(json.dumps([time.perf_counter() - began, token]), flush=True)


def transformers(folder: Path, threads: int) -> FirstToken:
    """sdpa is its fastest attention on a CPU; the logits of the last position alone."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa")

    @torch.inference_mode()
    def first_token(prompt: Sequence[int]) -> int:
        output = model(torch.tensor([list(prompt)]), use_cache=True, logits_to_keep=1)
        return int(output.logits[0, -1].argmax())

    return first_token


LIBRARIES: dict[str, Callable[[Path, int], FirstToken]] = {"transformers": transformers}

if __name__ == "__main__":
    main()
