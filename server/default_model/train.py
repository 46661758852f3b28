"""Train the embedded default model, a small Qwen3 checkpoint, from the Python standard library.

What it makes
    A folder in Hugging Face format (config, byte-level BPE tokenizer with a chat template, bfloat16
    safetensors) of about 9 MB.  The model writes recognisable Python and copies names and numbers out of
    its context.  It is a stand-in that lets the server start, and be tested, with no download; it is not
    an assistant.

Where the ideas are
    `corpus` reads the real text and trains the tokenizer, `facts` makes up what is to be recalled, `rows` mixes
    both into weighted training rows; `network` is the model, `induction` the copying circuit it starts with;
    `checkpoint` writes the folder.  Here are the run and its schedule:

    * The rows grow towards the end of the run, since picking one token out of many has to be learned on
      many tokens.
    * The run is a time budget, not a step count; the learning rate follows the elapsed share of it.
    * Matrices are trained with Muon (here; `torch.optim.Muon` takes 20 times as long on a CPU), which after
      the same 150 steps was at a held-out loss of 4.5 where AdamW was at 5.6; the rest uses AdamW.

Known limits
    * The text differs with the Python version, so a retrained tokenizer and weights differ from the shipped
      ones; `--tokenizer` keeps an existing tokenizer.
    * With a time budget the result depends on the machine's speed: the same seed gives the same rows in the
      same order, not the same weights.

    python -m server.default_model.train --out /tmp/default_model --minutes 40
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn
from tqdm import tqdm

from server.default_model.checkpoint import write_settings, write_weights
from server.default_model.corpus import read_sources, train_tokenizer
from server.default_model.induction import wire_induction_heads
from server.default_model.network import Network, Shape
from server.default_model.rows import VALUE_WEIGHT, Batch, Rows

PHASES = [  # (until this share of the run, rows in a batch, tokens in a row)
    (0.30, 32, 256),
    (0.62, 16, 512),
    (0.80, 8, 1024),
    (0.93, 4, 2048),
    (1.00, 2, 4096),
]
MATRIX_RATE = 0.02
OTHER_RATE = 4e-3
SAVE_EVERY = 120  # seconds
LOG_EVERY = 15  # seconds


class Muon:
    """Momentum whose update is made near-orthogonal by five Newton-Schulz steps, for hidden matrices.

    Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks", whose coefficients these are.
    """

    def __init__(self, weights: list[nn.Parameter], momentum: float = 0.95, decay: float = 0.01) -> None:
        self.weights, self.momentum, self.decay = weights, momentum, decay
        self.moments = [torch.zeros_like(weight) for weight in weights]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update the weights from their gradients, and drop these."""
        for weight, moment in zip(self.weights, self.moments, strict=True):
            if weight.grad is None:
                continue
            moment.lerp_(weight.grad, 1 - self.momentum)
            update = weight.grad.lerp(moment, self.momentum).bfloat16()
            update /= update.norm() + 1e-7
            tall = update.shape[0] > update.shape[1]
            update = update.T if tall else update
            for _ in range(5):
                square = update @ update.T
                update = 3.4445 * update + (2.0315 * (square @ square) - 4.775 * square) @ update
            update = update.T if tall else update
            weight.mul_(1 - rate * self.decay)
            weight.add_(update.float(), alpha=-rate * max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5)
            weight.grad = None


def pace(share: float) -> float:
    """The learning rate's factor: a short warm-up, level, and from half of the run on down to nearly none."""
    return min(1.0, share / 0.01 + 0.02, 2 * (1 - share) + 0.01)


@dataclass
class Spent:
    """What a run has used so far, over all its resumptions."""

    wall: float = 0.0  # seconds
    cpu: float = 0.0  # seconds of processor time, all threads together
    steps: int = 0
    tokens: int = 0


class Trainer:
    """All that a run must keep to be resumed: the network, its optimizers, the rows' random stream, what is spent."""

    def __init__(self, network: Network, rows: Rows, device: torch.device) -> None:
        self.network, self.rows, self.device = network.to(device), rows, device
        self.spent = Spent()
        named = list(network.named_parameters())
        self.muon = Muon([weight for name, weight in named if name.endswith("_proj.weight")])
        others = [weight for name, weight in named if not name.endswith("_proj.weight")]
        self.adam = torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step(self, batch: Batch, rate: float) -> dict[str, float]:
        """One update, at `rate` times the full learning rates.

        Gives the loss of ordinary text and, where there are any, the loss and the hit rate of recalled tokens.
        """
        ids, targets, weights, positions = (part.to(self.device) for part in batch)
        with torch.autocast(self.device.type, torch.bfloat16):
            losses, hits = self.network(ids, targets, positions)
        weights = weights.flatten()
        ((losses * weights).sum() / weights.sum()).backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        for group in self.adam.param_groups:
            group["lr"] = OTHER_RATE * rate
        self.adam.step()
        self.adam.zero_grad()
        self.muon.step(MATRIX_RATE * rate)
        self.spent.steps += 1
        self.spent.tokens += ids.numel()
        plain, copied = weights == 1.0, weights == VALUE_WEIGHT
        measured = {"loss": losses[plain].mean().item()}
        if copied.any():
            measured |= {"copy": losses[copied].mean().item(), "recall": hits[copied].float().mean().item()}
        return measured

    def save(self, folder: Path) -> None:
        state = {
            "network": self.network.state_dict(),
            "adam": self.adam.state_dict(),
            "moments": self.muon.moments,
            "rng": self.rows.rng.bit_generator.state,
            "spent": asdict(self.spent),
        }
        torch.save(state, folder / "training_state.pt")
        write_weights(folder, self.network)

    def resume(self, folder: Path) -> None:
        state = torch.load(folder / "training_state.pt", map_location=self.device)
        self.network.load_state_dict(state["network"])
        self.adam.load_state_dict(state["adam"])
        self.muon.moments = state["moments"]
        self.rows.rng.bit_generator.state = state["rng"]
        self.spent = Spent(**state["spent"])


class Budget:
    """How much of the run's time is over, by the clock that was asked for; adds the time that passes to `spent`."""

    def __init__(self, seconds: float, clock: str, spent: Spent) -> None:
        self.seconds, self.clock, self.spent = seconds, clock, spent
        self.wall, self.cpu = time.monotonic(), time.process_time()

    def used(self) -> float:
        """Seconds; by the clock "cpu", those of one thread."""
        wall, cpu = time.monotonic(), time.process_time()
        self.spent.wall += wall - self.wall
        self.spent.cpu += cpu - self.cpu
        self.wall, self.cpu = wall, cpu
        return self.spent.wall if self.clock == "wall" else self.spent.cpu / torch.get_num_threads()


def run(trainer: Trainer, budget: Budget, folder: Path) -> None:
    """Train until the budget is used, saving and logging on the way and at the end."""
    saved = logged = time.monotonic()
    means: dict[str, float] = {}  # moving averages of what each step measures
    length = 0
    with tqdm(total=round(budget.seconds), unit="s", smoothing=0) as bar:
        while True:
            used = budget.used()
            share = used / budget.seconds
            bar.n = min(round(used), bar.total)
            now = time.monotonic()
            if now - saved > SAVE_EVERY or share >= 1:
                saved = now
                trainer.save(folder)
            if means and (now - logged > LOG_EVERY or share >= 1):
                logged = now
                record = {key: round(value, 4) for key, value in {**asdict(trainer.spent), **means}.items()}
                with open(folder / "log.jsonl", "a", encoding="utf-8") as log:
                    log.write(json.dumps({**record, "length": length}) + "\n")
                bar.set_postfix_str(", ".join(f"{key} {value:.3f}" for key, value in means.items()))
            if share >= 1:
                break
            rows, length = next((rows, length) for until, rows, length in PHASES if share < until)
            for key, value in trainer.step(trainer.rows.batch(rows, length, share), pace(share)).items():
                means[key] = means.get(key, value) * 0.95 + value * 0.05


def train(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    if options.threads:
        torch.set_num_threads(options.threads)
    shape = Shape()
    sources, _ = read_sources()
    if options.tokenizer:
        tokenizer = Tokenizer.from_file(str(options.tokenizer))
        if (size := tokenizer.get_vocab_size()) > shape.vocab_size:
            raise ValueError(f"--tokenizer has {size} tokens, the network {shape.vocab_size}: leave it out")
    else:
        tokenizer = train_tokenizer(sources, shape.vocab_size)
    write_settings(options.out, tokenizer, shape)
    rows = Rows(tokenizer, sources, options.seed, shape.max_position_embeddings)
    network = Network(shape)
    wire_induction_heads(network)
    trainer = Trainer(network, rows, torch.device(options.device))
    if options.resume:
        trainer.resume(options.out)
    if options.compile:
        network.compile_parts()
    run(trainer, Budget(60.0 * options.minutes, options.clock, trainer.spent), options.out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded default model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and the log")
    parser.add_argument("--minutes", type=float, default=40.0, help="time budget (default: %(default)s)")
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="what the budget counts: time, or processor time over threads, for a machine with other work",
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch decides)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, help="an existing tokenizer.json to use instead of building one")
    parser.add_argument("--resume", action="store_true", help="go on from the state saved in --out")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="do not use torch.compile")
    options = parser.parse_args()
    if options.minutes <= 0:
        parser.error("--minutes must be above 0")
    if options.tokenizer and not options.tokenizer.is_file():
        parser.error(f"--tokenizer: no file {options.tokenizer}; name a tokenizer.json, or leave it out to build one")
    if options.resume and not (options.out / "training_state.pt").is_file():
        parser.error(f"--resume: no training_state.pt in {options.out}; name an earlier run's --out, or leave it out")
    train(options)


if __name__ == "__main__":
    main()
