"""`python -m benchmarks.decode`: time between tokens, through the server and in the bare model loop.

The bare loop runs the same workers on the same steps, all of which they have in advance: no scheduler, no HTTP, no
client. The steps are those that the scheduler would send, with made-up tokens. Both are up at the same time and run in
turn. Streams of a long context share all of it but their last tokens; each reads it for itself all the same.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from tqdm import tqdm

from benchmarks.command import parser_of, write_results
from benchmarks.launched import LaunchedServer
from benchmarks.streams import SETTLE, inter_token_seconds, read_streams
from scheduler.controller import Controller
from scheduler.request import GenerateRequest
from scheduler.worker_pool import WorkerPool
from server.config import load
from sp_backend.catalog import planner_for
from sp_backend.commands import SampledToken, Sampling, SequenceStep, Step, StepResult

OWN_TOKENS = 32  # at the end of each prompt; those before are the same for all streams
BARE, SERVED = "bare loop", "server"
Times = dict[tuple[int, int], dict[str, list[float]]]  # (context, streams) -> label -> seconds, one for each round


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("benchmarks.decode", __doc__, "flags (default: --sp-size 2 --threads-per-rank 1)")
    parser.add_argument("--streams", type=int, nargs="+", default=(1, 2, 4, 8, 16), metavar="N")
    parser.add_argument("--contexts", type=int, nargs="+", default=(128, 32768), metavar="TOKENS")
    parser.add_argument("--tokens", type=int, default=64, help="of each stream (default: 64)")
    parser.add_argument("--repeats", "--rounds", type=int, default=5, help="rounds over the cases (default: 5)")
    parser.add_argument("--quick", action="store_true", help="1 and 16 streams, contexts 128 and 4096, 2 rounds")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if args.quick:
        args.streams, args.contexts, args.repeats, args.tokens = (1, 16), (128, 4096), 2, 40
    times = measure(args.server_args or ["--sp-size", "2", "--threads-per-rank", "1"], args)
    report(times)
    write_results(args.json, as_json(times))
    if args.plot:
        plot(args.plot, times)
    return 0


def measure(server_args: Sequence[str], args: argparse.Namespace) -> Times:
    """args: streams, contexts, tokens, repeats."""
    cases = [(context, n) for context in args.contexts for n in args.streams]
    times: Times = {case: {BARE: [], SERVED: []} for case in cases}
    vocab_size = load(list(server_args)).model.vocab_size
    with LaunchedServer(*server_args) as server, bare_loop(server_args) as bare:
        for _, (context, n) in tqdm([(r, case) for r in range(args.repeats) for case in cases], desc="Cases"):
            prefix, prompts = make_prompts(context, n, vocab_size)
            times[context, n][BARE].append(bare.inter_token_seconds(prefix, prompts, args.tokens))
            read_streams(server.port, [prefix], 1)
            times[context, n][SERVED].append(inter_token_seconds(server.port, prompts, args.tokens))
    return times


def make_prompts(context: int, num_streams: int, vocab_size: int) -> tuple[list[int], list[list[int]]]:
    """What all share, and the prompts. The ends of a vocabulary are often special tokens: they are left out."""
    random = np.random.default_rng(context)
    ids = min(100, vocab_size // 4), vocab_size * 9 // 10
    prefix = random.integers(*ids, max(1, context - OWN_TOKENS)).tolist()
    return prefix, [[*prefix, *random.integers(*ids, OWN_TOKENS).tolist()] for _ in range(num_streams)]


class Recorder:
    """Workers that keep the steps and answer at once, with made-up tokens."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._answers: deque[list[StepResult]] = deque()
        self.steps: list[list[Step | None]] = []

    def submit(self, steps: list[Step | None]) -> None:
        self.steps.append(steps)
        drawn = [SampledToken(part.request_id, 5) for part in parts_of(steps) if part.sampling is not None]
        step_id = next(step.step_id for step in steps if step is not None)
        self._answers.append([StepResult(step_id, rank, drawn, 0.01, 0, 0, 0.0) for rank in range(self._world_size)])

    def poll(self, timeout: float) -> list[StepResult] | None:
        return self._answers.popleft() if self._answers else None


def parts_of(steps: Sequence[Step | None]) -> list[SequenceStep]:
    return [part for step in steps if step is not None for group in step.groups for part in group.sequences]


def of_all_streams(steps: Sequence[Sequence[Step | None]]) -> set[int]:
    """Ids of the steps in which as many streams get a token as in any on the same ranks."""
    found: dict[tuple[int, ...], dict[int, int]] = defaultdict(dict)  # ranks -> step id -> streams
    for step in steps:
        of_ranks = {rank: part.step_id for rank, part in enumerate(step) if part is not None}
        streams = {part.request_id for part in parts_of(step) if part.num_new == 1}
        found[tuple(of_ranks)][max(of_ranks.values())] = len(streams)
    return {step for each in found.values() for step, count in each.items() if count == max(each.values())}


class BareLoop:
    def __init__(self, pool: WorkerPool, controller: Controller, recorder: Recorder) -> None:
        self._pool = pool
        self._controller = controller
        self._recorder = recorder
        self._num_requests = 0

    def inter_token_seconds(self, prefix: list[int], prompts: Sequence[list[int]], num_tokens: int) -> float:
        """The median time of the steps in which all streams of their ranks get a token."""
        self._plan([prefix], 1)
        self._plan(prompts, num_tokens)
        steps, self._recorder.steps = self._recorder.steps, []
        for step in steps:
            self._pool.submit(step)
        results, wanted = [self._results() for _ in steps], of_all_streams(steps)
        seconds = [
            max(result.seconds + result.idle_seconds for result in each)
            for each in results
            if each[0].step_id in wanted
        ]
        return statistics.median(seconds[int(SETTLE * len(seconds)) :])

    def _plan(self, prompts: Sequence[list[int]], num_tokens: int) -> None:
        for prompt in prompts:
            self._num_requests += 1
            request = GenerateRequest(str(self._num_requests), prompt, num_tokens, Sampling(temperature=0.0))
            self._controller.submit(request)
        while self._controller.step():
            pass

    def _results(self) -> list[StepResult]:
        results = self._pool.poll(600.0)
        if results is None:
            raise RuntimeError("a step of the bare loop took more than 10 minutes")
        return results


@contextlib.contextmanager
def bare_loop(server_args: Sequence[str]) -> Iterator[BareLoop]:
    config = load(list(server_args))
    pool = WorkerPool(config.backend)
    pool.start()
    try:
        planner = planner_for(config.backend, config.model, pool.ready[0].machine)
        recorder = Recorder(config.backend.world_size)
        controller = Controller(
            config.scheduler, config.backend, recorder, pool.num_pages, lambda outputs: None, planner=planner
        )
        yield BareLoop(pool, controller, recorder)
    finally:
        pool.stop()


def report(times: Times) -> None:
    print(f"{'context':>8}{'streams':>9}{BARE:>14}{SERVED:>14}{'ratio':>8}{'tokens/s':>11}")
    for (context, n), row in times.items():
        bare, served = (statistics.median(row[label]) for label in (BARE, SERVED))
        milliseconds = f"{1000 * bare:>11.2f} ms{1000 * served:>11.2f} ms"
        print(f"{context:>8}{n:>9}{milliseconds}{served / bare:>8.3f}{n / served:>11.0f}")


def as_json(times: Times) -> dict[str, object]:
    rows = [{"context": context, "streams": n, "seconds": row} for (context, n), row in times.items()]
    return {"inter_token": rows}


def plot(file: Path, times: Times) -> None:
    matplotlib.use("agg")
    from matplotlib import pyplot

    contexts = sorted({context for context, _ in times})
    figure, axes = pyplot.subplots(1, len(contexts), figsize=(4.5 * len(contexts), 4), squeeze=False)
    for axis, context in zip(axes[0], contexts, strict=True):
        streams = [n for c, n in times if c == context]
        for label in (BARE, SERVED):
            values = [1000 * statistics.median(times[context, n][label]) for n in streams]
            axis.plot(streams, values, marker="o", label=label)
        axis.set(title=f"context {context}", xlabel="streams", ylabel="time between tokens (ms)", ylim=(0, None))
        axis.set_xscale("log", base=2)
        axis.set_xticks(streams, [str(n) for n in streams])
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
