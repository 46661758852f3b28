"""Attention of two sequences whose tokens are sharded over all ranks, compared with full attention on one.

torchrun --standalone --nproc-per-node 2 docs/examples/attention.py
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch.nn.functional import scaled_dot_product_attention

import sp_backend

HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[3000, 37], help="tokens of each sequence")
    parser.add_argument("--strategy", default="auto", help="what travels between the ranks")
    args = parser.parse_args()
    dist.init_process_group("gloo")

    torch.manual_seed(0)  # the same full tensors on every rank, only to have something to compare with
    full = [torch.randn(sum(args.lengths), heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    q, k, v = (sp_backend.shard(x, args.lengths) for x in full)
    out = sp_backend.attention(q, k, v, lengths=args.lengths, strategy=args.strategy)
    error = (sp_backend.unshard(out, args.lengths) - full_attention(full, args.lengths)).abs().max()

    sent = torch.tensor(sp_backend.counters().bytes_sent)
    dist.all_reduce(sent)
    if dist.get_rank() == 0:
        print(f"{args.strategy} on {dist.get_world_size()} ranks: {q.shape[0]} of {full[0].shape[0]} tokens on rank 0")
        print(f"max error against full attention: {error:.1e}")
        print(f"bytes sent by all ranks: {sent:,}")
    dist.destroy_process_group()


def full_attention(qkv: list[torch.Tensor], lengths: list[int]) -> torch.Tensor:
    """Causal, one sequence after the other: [tokens, heads, head_dim]."""
    sequences = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in qkv), strict=True)  # [heads, tokens, head_dim]
    outs = [
        scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]
        for q, k, v in sequences
    ]
    return torch.cat(outs, dim=1).transpose(0, 1)


if __name__ == "__main__":
    main()
