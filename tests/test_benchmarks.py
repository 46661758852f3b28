"""What the benchmarks rest on: whose rows are whose, that a wrong result is seen, and that every token is counted."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.attention_peers import NUM_RANKS, WRONG, error, positions
from benchmarks.attention_ranks import Shape
from benchmarks.command import without_folders
from benchmarks.prefill_peers import Peer, check_same_model
from benchmarks.serve import ratio_of_medians
from benchmarks.streams import read_streams
from benchmarks.turns import Run, medians

SHAPE = Shape(4, 2, 16)
TOKENS = 128


@pytest.mark.parametrize("name", ["ring_pass_kv", "yunchang Ulysses"])
def test_every_row_has_one_rank(name: str) -> None:
    rows = torch.cat([positions(name, rank, TOKENS) for rank in range(NUM_RANKS)])
    assert rows.sort().values.tolist() == list(range(TOKENS))


@pytest.mark.parametrize("rank", range(NUM_RANKS))
def test_a_wrong_output_is_seen(rank: int) -> None:
    torch.manual_seed(0)
    q, kv = SHAPE.tensors(TOKENS, TOKENS)
    where = positions("ring_pass_kv", rank, TOKENS)
    keys, values = kv.float().repeat_interleave(2, dim=2).transpose(0, 2).unbind(1)
    right = torch.nn.functional.scaled_dot_product_attention(q.float().transpose(0, 1), keys, values, is_causal=True)
    out = right.transpose(0, 1)[where].bfloat16()
    assert error(SHAPE, out, where, q, kv) < 0.005
    assert error(SHAPE, out.roll(1, 0), where, q, kv) > WRONG
    assert error(SHAPE, out * 1.1, where, q, kv) > WRONG


def test_results_name_no_folder_of_the_machine_that_they_were_taken_on(tmp_path: Path) -> None:
    words = [f"{tmp_path}/bin/python", "-m", "benchmarks.memory", "--json", f"{tmp_path}/memory.json", "--quick"]
    (tmp_path / "bin").mkdir()
    words += [f"--model-path={tmp_path}/my-model", "http://127.0.0.1:30000/v1", "2xnvlink4-4/nic400"]
    shown = "python -m benchmarks.memory --json memory.json --quick --model-path=my-model".split()
    assert [without_folders(word) for word in words] == [*shown, "http://127.0.0.1:30000/v1", "2xnvlink4-4/nic400"]


def test_peers_that_compute_different_models_are_refused() -> None:
    peers = [Peer(name, Path()) for name in ("one", "same", "other")]
    logits = np.random.default_rng(0).standard_normal((2, 100))
    peers[0].logits, peers[1].logits, peers[2].logits = logits[0], 1.01 * logits[0], logits[1]
    check_same_model(peers[:2])
    with pytest.raises(RuntimeError, match="other computes another model than one"):
        check_same_model(peers)


def answer(packets: Sequence[bytes]) -> int:
    """The port of a server that takes one request, and answers it packet by packet."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with suppress(ConnectionError), listener, listener.accept()[0] as connection:  # the client leaves a failed one
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while not connection.recv(1 << 16).endswith(b"}"):
                pass
            for packet in packets:
                connection.sendall(packet)
                time.sleep(0.005)

    threading.Thread(target=serve, daemon=True).start()
    port: int = listener.getsockname()[1]
    return port


@pytest.mark.parametrize("size", [1, 3, 8, 1000])
def test_tokens_are_counted_however_the_stream_is_cut(size: int) -> None:
    text = b'data: {"a"}\n\n' * 3 + b"data: [DONE]\n\n"
    (arrivals,) = read_streams(answer([text[i : i + size] for i in range(0, len(text), size)]), [[1, 2]], 3)
    assert len(arrivals) == 3 and arrivals == sorted(arrivals)


@pytest.mark.parametrize("rest", [b'data: {"error": "out of memory"}\n\ndata: [DONE]\n\n', b""])
def test_a_stream_that_fails_or_breaks_off_is_no_measurement(rest: bytes) -> None:
    with pytest.raises(RuntimeError, match=r'the server ended a stream: .*"a"'):
        read_streams(answer([b'data: {"a"}\n\n', rest]), [[1, 2]], 3)


def test_turns_in_which_the_cores_were_slow_do_not_count() -> None:
    slow, quick = Run(wall=3.0, cpu=5.0, pace=1.2), Run(wall=1.0, cpu=2.0, pace=1.01)
    assert medians([slow, quick, slow, quick, slow], 2, fastest=1.0) == (1.0, 2.0, 1.01)
    assert medians([slow, quick, slow], 3, fastest=1.0) == (3.0, 5.0, 1.2)


def test_a_ratio_says_how_sure_it_is() -> None:
    random = np.random.default_rng(1)
    for count, width in (20, 0.2), (2000, 0.02):
        ratio = ratio_of_medians(random.normal(1.1, 0.1, count).tolist(), random.normal(1.0, 0.1, count).tolist())
        assert ratio.low < 1.1 < ratio.high and ratio.low < ratio.value < ratio.high
        assert width / 2 < ratio.high - ratio.low < 1.5 * width
