"""`python -m benchmarks.greedy`: the same greedy text whatever the number of ranks, layout and strategy.

In float32, over HTTP, long prompts of Python source. The answers of every setup are compared with those of sp 1; the
exit code is 1 if one differs. (Short prompts, and every model family against transformers: see tests/e2e.)
"""

from __future__ import annotations

import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
from tqdm import tqdm

from benchmarks.command import parser_of, write_results
from benchmarks.launched import LaunchedServer
from server.arguments import STRATEGIES

VARIANTS: dict[str, tuple[str, ...]] = {
    "auto": (),
    **{name: ("--sp-strategy", name) for name in STRATEGIES["tokens"]},
    "sharded_q": ("--sp-layout", "heads"),
    "sharded_q, redundant": ("--sp-layout", "heads", "--sp-redundant-kv"),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("benchmarks.greedy", __doc__)
    parser.add_argument("--sp-sizes", type=int, nargs="+", default=(2, 3, 4), metavar="N")
    parser.add_argument("--setups", nargs="+", choices=VARIANTS, default=tuple(VARIANTS), metavar="NAME")
    parser.add_argument("--lengths", type=int, nargs="+", default=(2000, 8000), metavar="TOKENS")
    parser.add_argument("--output-tokens", type=int, default=32)
    args = parser.parse_args(argv)
    setups = {"sp 1": ("--sp-size", "1")} | {
        f"sp {n}, {name}": ("--sp-size", str(n), *VARIANTS[name]) for n in args.sp_sizes for name in args.setups
    }
    rows = []
    expected: list[str] | None = None
    for label, flags in tqdm(setups.items(), desc="Setups", unit="setup"):
        began = time.perf_counter()
        with LaunchedServer("--dtype", "float32", "--oversubscribe", *flags, *args.server_args) as server:
            texts = list(answers(server.url, args.lengths, args.output_tokens))
        expected = expected or texts
        rows.append({"setup": label, "equal": texts == expected, "seconds": time.perf_counter() - began})
        tqdm.write(f"{label:28} {'equal' if texts == expected else 'DIFFERENT'}")
    write_results(args.json, {"expected": expected, "rows": rows})
    return int(not all(row["equal"] for row in rows))


def answers(url: str, lengths: Sequence[int], output_tokens: int) -> Iterator[str]:
    source = (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_text()
    with httpx.Client(base_url=url, timeout=1800) as http:
        tokens = http.post("/tokenize", json={"prompt": source}).raise_for_status().json()["tokens"]
        for length in lengths:
            prompt = (tokens * (1 + length // len(tokens)))[:length]
            body = {"prompt": prompt, "max_tokens": output_tokens, "temperature": 0, "ignore_eos": True}
            yield http.post("/v1/completions", json=body).raise_for_status().json()["choices"][0]["text"]


if __name__ == "__main__":
    sys.exit(main())
