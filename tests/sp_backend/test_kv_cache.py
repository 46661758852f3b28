from pathlib import Path

import numpy as np
import pytest
import torch

from sp_backend.kv_cache import KVCache, PageTable, Rows

PAGE = 4


def table(sp_rank: int, owners: list[int]) -> PageTable:
    """Page p of the request has index 10 * p on its owner."""
    pages = np.array([10 * p for p, owner in enumerate(owners) if owner == sp_rank], "<i4")
    made = PageTable(sp_rank, PAGE)
    made.append(bytes(owners[:2]), pages[: owners[:2].count(sp_rank)].tobytes())
    made.append(bytes(owners[2:]), pages[owners[:2].count(sp_rank) :].tobytes())
    return made


@pytest.mark.parametrize("seed", range(20))
def test_ranks_agree_on_the_history_and_hold_each_position_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_ranks, num_pages = int(rng.integers(1, 5)), int(rng.integers(2, 9))
    owners = [int(r) for r in rng.integers(0, num_ranks, num_pages)]
    start = int(rng.integers(0, num_pages * PAGE + 1))
    tables = [table(r, owners) for r in range(num_ranks)]

    held = [tables[0].history_positions(start, r) for r in range(num_ranks)]
    assert sorted(np.concatenate(held)) == list(range(start))
    for r, own in enumerate(tables):
        assert own.history_rows(start, num_ranks) == [len(p) for p in held]
        want = [10 * (p // PAGE) * PAGE + p % PAGE for p in held[r]]
        assert own.slots(0, start).tolist() == want
        middle = int(rng.integers(0, start + 1))
        assert own.slots(0, middle).tolist() + own.slots(middle, start).tolist() == want


def cache(num_pages: int) -> KVCache:
    return KVCache(
        num_layers=2,
        num_pages=num_pages,
        page_size=PAGE,
        num_kv_heads=2,
        head_dim=8,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("slots", [[5, 6, 7], [5, 7, 6], []])
def test_what_is_written_is_read_back(slots: list[int]) -> None:
    written = cache(3)
    rows = Rows(np.array(slots, np.int64), torch.device("cpu"))
    kv = torch.randn(len(slots), 2, 2, 8)
    written.write(1, rows, kv)
    assert torch.equal(rows.of(written.pages(1)), kv)
    assert rows.contiguous == (slots != [5, 7, 6])
    assert written.nbytes == 3 * KVCache.bytes_per_page(
        num_layers=2, page_size=PAGE, num_kv_heads=2, head_dim=8, itemsize=4
    )


def test_a_cache_that_the_system_has_no_memory_for_is_refused_by_its_size() -> None:
    with pytest.raises(ValueError, match="no memory for a KV cache of .* bytes: lower --max-total-tokens"):
        cache(1 << 45)


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a kernel without huge pages")
def test_huge_pages_are_asked_for() -> None:
    pages = cache(4096).pages(1)
    assert "hg" in flags_of_memory(pages.data_ptr())


def flags_of_memory(address: int) -> list[str]:
    """Those of the area of this process's memory that holds an address, as Linux calls them."""
    holds = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if name == "VmFlags:" and holds:
            return values
        if not name.endswith(":"):
            low, high = (int(end, 16) for end in name.split("-"))
            holds = low <= address < high
    raise ValueError(f"no memory at {address:#x}")
