"""What each process of the collectives test runs; apart from the test so that processes start fast."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from sp_backend.models.config import ModelConfig
from sp_backend.models.decoder import Decoder
from sp_backend.parallel import NoCollectives, Shard
from sp_backend.transport.collectives import GroupCollectives

NUM_RANKS = 2


class OwnValues:
    """Attention of each token to itself."""

    kv_rows = slice(None)
    last_rows = None

    def attend(self, layer: int, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        return kv[:, 1].repeat_interleave(q.shape[1] // kv.shape[2], dim=1)


def compare_split_with_whole(rank: int, store: str, folder: Path) -> None:
    """The same dummy model, tensor parallel over gloo and whole; MLP and vocabulary split unevenly."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=NUM_RANKS)
    config = ModelConfig.load(folder)
    assert config.intermediate_size % NUM_RANKS and config.vocab_size % NUM_RANKS
    assert dist.group.WORLD is not None
    collectives = GroupCollectives(dist.group.WORLD)
    try:
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)):
            split = Decoder(config, Shard(rank, NUM_RANKS), dtype, "cpu", collectives)
            whole = Decoder(config, Shard(), dtype, "cpu", NoCollectives())
            logits = []
            for decoder in (split, whole):
                decoder.fill_dummy(5)
                logits.append(decoder.logits(decoder.forward(torch.arange(9), torch.arange(9), OwnValues())))
            torch.testing.assert_close(logits[0], logits[1], atol=tolerance, rtol=0)
    finally:
        dist.destroy_process_group()
