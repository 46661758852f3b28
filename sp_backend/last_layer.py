"""The last layer of a prefill runs as a decode step. Pure: no torch.

Of a prompt's last layer only the last token's hidden state is read: a token is drawn from it. Keys and values of all
tokens are made and kept in every layer; but queries, attention, output projection and MLP of the last one are those of
one row a sequence, and one row over keys in pages is what the plans of decode steps are for, whichever plan the other
layers ran under. (llama.cpp leaves out the same rows from the MLP on.)

Every rank that runs a group decides the same, from what is equal on all of them.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

import msgspec

from sp_backend.commands import DECODE, LOCAL, TOKEN_BYTES, Group
from sp_backend.layout import Layout

FEW = 48  # rows of a small model that cost less than laying out the group once more


def only_last_is_wanted(group: Group) -> bool:
    """Whether the last layer need not see all rows of a group, and that is worth while."""
    if any(sequence.scoring is not None or sequence.pooling == "mean" for sequence in group.sequences):
        return False
    return sum(sequence.num_new for sequence in group.sequences) >= len(group.sequences) + FEW


def as_decode(group: Group, chunks: Sequence[int], layout: Layout, held: Container[int]) -> Group:
    """Of each sequence its last new token, after all others. chunks: that hold these tokens, under the group's layout;
    held: whose tokens this rank has.
    """
    parts = [
        msgspec.structs.replace(
            sequence,
            start=sequence.start + sequence.num_new - 1,
            num_new=1,
            home=layout.owner(chunk),
            degree=1,
            page_owners=b"",
            pages=b"",
            tokens=sequence.tokens[-TOKEN_BYTES:] if chunk in held else b"",
        )
        for sequence, chunk in zip(group.sequences, chunks, strict=True)
    ]
    return Group(LOCAL if group.plan == LOCAL else DECODE, parts)
