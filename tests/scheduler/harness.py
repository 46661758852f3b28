"""A controller on fake workers with simulated time, and what its requests were told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from scheduler.config import SchedulerConfig
from scheduler.controller import Controller
from scheduler.plans import StepPlanner
from scheduler.request import GeneratedToken, GenerateRequest, Output, StepReport
from sp_backend.commands import Sampling
from tests.scheduler.fake_workers import Clock, FakeWorkers, backend_config


@dataclass(frozen=True)
class Predicted:
    """A planner's answer."""

    variant: str
    reason: str
    seconds: float


@dataclass
class Harness:
    controller: Controller
    workers: FakeWorkers
    tokens: dict[str, list[int]] = field(default_factory=dict)
    prompts: dict[str, list[GeneratedToken]] = field(default_factory=dict)  # with their log-probabilities
    times: dict[str, list[float]] = field(default_factory=dict)  # when each token came
    ends: dict[str, Output] = field(default_factory=dict)
    steps: dict[str, list[StepReport]] = field(default_factory=dict)

    def receive(self, outputs: list[Output]) -> None:
        for output in outputs:
            assert output.request_id not in self.ends, "nothing after the last output"
            self.tokens.setdefault(output.request_id, []).extend(t.token for t in output.tokens)
            self.prompts.setdefault(output.request_id, []).extend(output.prompt)
            self.times.setdefault(output.request_id, []).extend(self.workers.clock.now for _ in output.tokens)
            self.steps.setdefault(output.request_id, []).extend(output.steps)
            if output.finish_reason:
                self.ends[output.request_id] = output

    def submit(self, request_id: str, prompt: list[int], max_tokens: int = 4, **sampling: object) -> None:
        request = GenerateRequest(request_id, prompt, max_tokens, Sampling(**sampling))  # type: ignore[arg-type]
        self.controller.submit(request)

    def run(self, num_steps: int = 100_000) -> None:
        """Until nothing is left to do, or for a number of steps."""
        for _ in range(num_steps):
            if not self.controller.step():
                break
        self.controller.hand_out()
        assert self.controller.healthy() is None

    def longest_gap(self, request_id: str) -> float:
        times = self.times[request_id]
        return max(later - earlier for earlier, later in zip(times, times[1:], strict=False))


def make_harness(
    config: SchedulerConfig | None = None,
    pages_per_rank: int = 1000,
    seconds: Callable[[float, float], float] = lambda tokens, pairs: 0.001,
    planner: StepPlanner | None = None,
    **backend: object,
) -> Harness:
    clock, resolved = Clock(), backend_config(**backend)
    workers = FakeWorkers(resolved, pages_per_rank, clock, seconds)
    made: list[Harness] = []
    controller = Controller(
        config or SchedulerConfig(),
        resolved,
        workers,
        pages_per_rank,
        lambda o: made[0].receive(o),
        clock=clock,
        planner=planner,
    )
    made.append(Harness(controller, workers))
    return made[0]
