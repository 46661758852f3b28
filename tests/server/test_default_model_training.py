"""How the embedded model is made: text, rows, network, starting circuit, and a run that can be resumed."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from server.default_model.checkpoint import write_settings, write_weights
from server.default_model.corpus import SPECIAL_TOKENS, Source, train_tokenizer
from server.default_model.induction import wire_induction_heads
from server.default_model.network import Network, Shape
from server.default_model.rows import VALUE_WEIGHT, Rows
from server.default_model.train import Muon, Trainer, pace

SMALL = Shape(
    vocab_size=400,
    hidden_size=96,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=8192,
)


@pytest.fixture(scope="module")
def sources() -> list[Source]:
    library = Path(sysconfig.get_paths()["stdlib"])
    return [Source(name, (library / name).read_text()) for name in ("textwrap.py", "shutil.py", "heapq.py")]


@pytest.fixture(scope="module")
def tokenizer(sources: list[Source]) -> Tokenizer:
    return train_tokenizer(sources, SMALL.vocab_size)


@pytest.fixture
def rows(tokenizer: Tokenizer, sources: list[Source]) -> Rows:
    return Rows(tokenizer, sources, seed=1, max_position=SMALL.max_position_embeddings)


def test_the_tokenizer_keeps_every_text_and_cuts_numbers_into_digits(tokenizer: Tokenizer) -> None:
    text = "def f(x):\n    return 4821 + x  # naïve 日本\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert set("4821") <= set(tokenizer.encode(text).tokens)
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))


def test_the_same_seed_gives_the_same_batches(tokenizer: Tokenizer, sources: list[Source]) -> None:
    one, same, other = (Rows(tokenizer, sources, seed, SMALL.max_position_embeddings) for seed in (1, 1, 2))
    first, second, third = (rows.batch(4, 128, 0.5) for rows in (one, same, other))
    assert all(map(torch.equal, first, second))
    assert not torch.equal(first.inputs, third.inputs)
    assert [tuple(part.shape) for part in first] == [(4, 128)] * 4
    assert torch.equal(first.inputs[:, 1:], first.targets[:, :-1])


def test_a_token_that_counts_as_recalled_stands_further_up(rows: Rows, tokenizer: Tokenizer) -> None:
    recalled = 0
    for make in (rows.recall_row, rows.chat_row):
        for _ in range(20):
            ids, weights = make(400)
            marked = np.flatnonzero(weights == VALUE_WEIGHT)
            for run in np.split(marked, np.flatnonzero(np.diff(marked) > 1) + 1):
                if len(run):
                    value = tokenizer.decode(ids[run].tolist()).strip()
                    assert value in tokenizer.decode(ids[: run[0]].tolist(), skip_special_tokens=False)
                    recalled += 1
    assert recalled > 50


def test_positions_rise_and_jump_only_within_the_window(rows: Rows) -> None:
    assert np.array_equal(rows.positions(64, share=0.0), np.arange(64))
    drawn = [rows.positions(64, share=1.0) for _ in range(50)]
    assert all(np.all(np.diff(positions) >= 1) and positions[0] == 0 for positions in drawn)
    assert 64 < max(positions[-1] for positions in drawn) < SMALL.max_position_embeddings


@pytest.mark.parametrize("length", [64, 128, 70])  # by blocks of 64, and by the fused operator
def test_the_exported_weights_mean_the_same_to_transformers(length: int, tokenizer: Tokenizer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Network(SMALL)
    for weight in network.parameters():
        weight.data = (weight.data + 0.1 * torch.randn_like(weight)).bfloat16().float()
    write_settings(tmp_path, tokenizer, SMALL)
    write_weights(tmp_path, network)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    ids = torch.randint(SMALL.vocab_size, (2, length + 1))
    positions = torch.arange(length).expand(2, -1) * 50
    with torch.inference_mode():
        loss, hit = network(ids[:, :-1], ids[:, 1:], positions)
        logits = model(input_ids=ids[:, :-1], position_ids=positions).logits.flatten(0, 1)
    targets = ids[:, 1:].flatten()
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    assert torch.equal(hit, logits.argmax(-1) == targets)


def test_before_any_training_the_wired_network_copies() -> None:
    """Of random tokens shown twice, most are foretold at the second showing, and none without the wiring."""
    torch.manual_seed(0)
    shape = Shape(vocab_size=1000)
    network = Network(shape)
    span = torch.randint(shape.vocab_size, (8, 32))
    ids = torch.cat((span, span), dim=1)
    positions = torch.arange(63).expand(8, -1)

    def foretold() -> float:
        with torch.inference_mode():
            hits = network(ids[:, :-1], ids[:, 1:], positions)[1].view(8, 63)
        return float(hits[:, 33:].float().mean())

    assert foretold() < 0.05
    wire_induction_heads(network)
    assert foretold() > 0.7


def test_muon_moves_all_directions_of_a_matrix_alike() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(16, 24))
    weight.grad = torch.randn(16, 4) @ torch.randn(4, 24) + 0.1 * torch.randn(16, 24)
    Muon([weight]).step(rate=1.0)
    moved = torch.linalg.svdvals(weight.detach())
    assert weight.grad is None
    assert 0.3 < float(moved.min()) <= float(moved.max()) < 1.3


def test_the_pace_warms_up_holds_and_falls() -> None:
    assert [round(pace(share), 2) for share in (0.0, 0.005, 0.3, 0.5, 0.75, 1.0)] == [0.02, 0.52, 1, 1, 0.51, 0.01]


def test_a_resumed_run_goes_on_as_if_never_ended(tokenizer: Tokenizer, sources: list[Source], tmp_path: Path) -> None:
    def trainer() -> Trainer:
        torch.manual_seed(0)
        rows = Rows(tokenizer, sources, seed=0, max_position=SMALL.max_position_embeddings)
        return Trainer(Network(SMALL), rows, torch.device("cpu"))

    def train(trainer: Trainer, steps: int) -> list[dict[str, float]]:
        return [trainer.step(trainer.rows.batch(4, 64, 0.5), 1.0) for _ in range(steps)]

    first = trainer()
    losses = train(first, 4)
    first.save(tmp_path)
    second = trainer()
    second.resume(tmp_path)
    assert train(second, 3) == train(first, 3)
    assert second.spent.steps == 7 and second.spent == first.spent
    assert losses[-1]["loss"] < losses[0]["loss"]
