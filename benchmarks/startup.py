"""`python -m benchmarks.startup`: seconds from the command to a server that answers, and the CPU time of its processes.

What is compiled at first use is compiled before the first round.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence

import psutil
from tqdm import trange

from benchmarks.command import parser_of, write_results
from benchmarks.launched import LaunchedServer


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("benchmarks.startup", __doc__, "flags of the server (default: --sp-size 2)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="once")
    args = parser.parse_args(argv)
    flags = args.server_args or ["--sp-size", "2"]
    start(flags)
    rounds = [start(flags) for _ in trange(1 if args.quick else args.repeats, desc="Starts")]
    seconds = [wall for wall, _ in rounds]
    print(f"ready after {statistics.median(seconds):.2f} s (median; {min(seconds):.2f} to {max(seconds):.2f})")
    for number, name in enumerate(["server", *(f"rank {i}" for i in range(len(rounds[0][1]) - 1))]):
        print(f"  CPU time of the {name}: {statistics.median(cpu[number] for _, cpu in rounds):.2f} s")
    cpu_seconds = [cpu for _, cpu in rounds]
    write_results(args.json, {"ready_seconds": seconds, "cpu_seconds": cpu_seconds})
    return 0


def start(flags: Sequence[str]) -> tuple[float, list[float]]:
    """Seconds until ready, to a tenth, and the CPU seconds that the server and then each rank had used by then."""
    began = time.perf_counter()
    with LaunchedServer(*flags) as server:
        seconds = time.perf_counter() - began
        process = psutil.Process(server.process.pid)
        times = [p.cpu_times() for p in (process, *process.children(recursive=True))]
        return seconds, [t.user + t.system for t in times]


if __name__ == "__main__":
    sys.exit(main())
