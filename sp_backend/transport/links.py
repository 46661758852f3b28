"""How a rank of a server reaches the others: of its SP group, and of those that it shares a set of weights with."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from sp_backend.config import BackendConfig
from sp_backend.parallel import Collectives, NoCollectives, Shard
from sp_backend.transport import Transport
from sp_backend.transport.collectives import GroupCollectives
from sp_backend.transport.gloo import GlooTransport
from sp_backend.transport.shared_memory import shared_memory

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Links:
    transport: Transport
    collectives: Collectives


def connect(config: BackendConfig, rank: int) -> Links:
    """Every rank of the world must call this: process groups are made by all ranks, for all groups, in one order."""
    gloo = GlooTransport.create(config.world_size, config.sp_size, rank, config.dist_timeout)
    transport: Transport = shared_memory(gloo, config.dist_timeout) or gloo
    if rank == 0 and config.sp_size > 1:
        logger.info("SP ranks reach each other through %s", transport.name)
    shards = [Shard.of_rank(r, config.tp_size, config.sp_size, config.layout) for r in range(config.world_size)]
    collectives: Collectives = NoCollectives()
    for ranks in sorted({tuple(shard.group_ranks()) for shard in shards}):
        if len(ranks) > 1:
            timeout = timedelta(seconds=config.dist_timeout)
            group = dist.new_group(list(ranks), backend="gloo", timeout=timeout)
            if rank in ranks:
                collectives = GroupCollectives(group)
    return Links(transport, collectives)
