"""`python -m benchmarks.attention --only peers`: two ranks of ours beside two of each library, in the same processes.

The environment of `make bench-peers` runs it. No library shares attention over CPU ranks as it is installed; what each
needs is below, and puts its own algorithm on torch's CPU flash kernel, the only one with an LSE that it can reach:

- torch's context_parallel has no entry for that kernel in its dispatcher: its ring is called directly with it;
- yunchang's torch backend names the CUDA kernel: that name is replaced.

Every output is compared with attention written out in fp32 for some of the queries.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from benchmarks import peers
from benchmarks.attention_ranks import Shape, layer_of
from benchmarks.turns import rank_medians
from sp_backend.kernels import HeadMap, Span, Work, get_kernel
from sp_backend.native import choose_kernel
from sp_backend.transport.gloo import GlooTransport
from sp_backend.transport.shared_memory import shared_memory

NUM_RANKS = 2
OURS = ("ring_pass_kv", "token_ring")
CHECKED = 16  # queries of a rank
WRONG = 0.05  # relative RMS error: bfloat16 costs 0.003, and 0.013 where the LSE is rounded to it too
WAIT = timedelta(minutes=10)
Run = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [rows, heads, head_dim], k, v -> out like q


@dataclass(frozen=True, slots=True)
class Job:
    shape: Shape
    tokens: int
    turns: int
    folder: str


def measure(shape: Shape, tokens: int, turns: int) -> dict[str, Any]:
    """Medians of the slowest rank in seconds, rates of both ranks together, and each output's relative RMS error."""
    with tempfile.TemporaryDirectory() as folder:
        job = json.dumps(asdict(Job(shape, tokens, turns, folder)))
        subprocess.run([str(peers.PYTHON), "-m", __name__, job], check=True, timeout=3600)
        found = json.loads((Path(folder) / "results").read_text())
    seconds, errors = found["seconds"], found["error"]
    wrong = [name for name in seconds if errors[name] > WRONG]
    fastest = min((n for n in seconds if n not in (*OURS, *wrong)), key=seconds.__getitem__)
    return {
        "shape": str(shape),
        "tokens": tokens,
        "gflops": {name: shape.flops(tokens) / each / 1e9 for name, each in seconds.items()},
        **found,
        "wrong": wrong,
        "fastest_peer": fastest,
        "over_fastest_peer": {name: seconds[fastest] / seconds[name] for name in OURS},
    }


def context_parallel(method: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.distributed.tensor.experimental import _attention as experimental

    experimental.set_rotate_method(method)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out, _ = experimental._templated_ring_attention(dist.group.WORLD, 2, flash, q, k, v, is_causal=True)
    return out[0].transpose(0, 1)


def yunchang_zigzag(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    import yunchang
    from yunchang.kernels import AttnType

    attend = partial(yunchang.zigzag_ring_flash_attn_func, causal=True, attn_type=AttnType.TORCH_FLASH)
    return attend(q[None], k[None], v[None], group=dist.group.WORLD)[0]


def yunchang_ulysses() -> Run:
    import yunchang
    from yunchang.kernels import AttnType

    yunchang.set_seq_parallel_pg(NUM_RANKS, 1, dist.get_rank(), NUM_RANKS)
    layer = yunchang.LongContextAttention(ring_impl_type="basic", attn_type=AttnType.TORCH_FLASH)
    return lambda q, k, v: layer(q[None], k[None], v[None], causal=True)[0]


def libraries() -> dict[str, Run]:
    import yunchang.kernels.attention

    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    yunchang.kernels.attention._scaled_dot_product_flash_attention = flash
    return {
        "torch context_parallel, allgather": partial(context_parallel, "allgather"),
        "torch context_parallel, alltoall": partial(context_parallel, "alltoall"),
        "yunchang zigzag ring": yunchang_zigzag,
        "yunchang Ulysses": yunchang_ulysses(),
    }


def positions(name: str, rank: int, tokens: int) -> Tensor:
    """Of a rank's rows: a half of them near either end of the prompt, or for Ulysses neighbours."""
    if name.endswith("Ulysses"):
        return torch.arange(tokens).chunk(NUM_RANKS)[rank]
    chunks = torch.arange(tokens).chunk(2 * NUM_RANKS)
    return torch.cat((chunks[rank], chunks[-1 - rank]))


def error(shape: Shape, out: Tensor, where: Tensor, q: Tensor, kv: Tensor) -> float:
    """Relative RMS error of some rows of out, which are those of the whole prompt's q and kv at `where`."""
    rows = torch.linspace(0, len(where) - 1, CHECKED).long()
    spans = tuple(Span(i, i + 1, 0, int(p) + 1) for i, p in enumerate(where[rows]))
    heads = HeadMap(0, shape.num_heads, shape.num_heads // shape.num_kv_heads)
    work = Work(spans, True, heads, shape.head_dim, shape.head_dim**-0.5, CHECKED)
    expected = get_kernel("reference")(work)(q[where[rows]], kv).out
    return float((out[rows].float() - expected).norm() / expected.norm())


def _rank(rank: int, job: Job) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{job.folder}/store", WAIT, NUM_RANKS, rank)
    gloo = GlooTransport.create(NUM_RANKS, NUM_RANKS, rank, WAIT.total_seconds())
    transport = shared_memory(gloo, WAIT.total_seconds()) or gloo
    torch.manual_seed(0)
    shape = Shape(*job.shape)
    q, kv = shape.tensors(job.tokens, job.tokens)
    outputs: dict[str, Tensor] = {}
    runs: dict[str, Callable[[], object]] = {}
    for name in OURS:
        where = positions(name, rank, job.tokens)
        layer = layer_of(name, transport, choose_kernel()[0], shape, job.tokens, tensors=(q[where], kv[where]))
        runs[name] = partial(_keep, outputs, name, layer)
    for name, run in libraries().items():
        where = positions(name, rank, job.tokens)
        k, v = kv[where].unbind(1)
        runs[name] = partial(_keep, outputs, name, partial(run, q[where], k.contiguous(), v.contiguous()))
    with torch.no_grad():
        times = rank_medians(runs, job.turns)
    errors = torch.tensor([error(shape, outputs[n], positions(n, rank, job.tokens), q, kv) for n in runs])
    dist.all_reduce(errors, dist.ReduceOp.MAX)
    if rank == 0:
        seconds = {name: each.wall for name, each in times.items()}
        found = {"seconds": seconds, "error": dict(zip(runs, errors.tolist(), strict=True))}
        (Path(job.folder) / "results").write_text(json.dumps(found))


def _keep(outputs: dict[str, Tensor], name: str, run: Callable[[], Tensor]) -> None:
    outputs[name] = run()


if __name__ == "__main__":
    spawn(_rank, (Job(**json.loads(sys.argv[1])),), nprocs=NUM_RANKS)
