"""`python -m sp_backend.explain`: which plan suits a batch on a machine that need not be at hand, and why.

Costs every candidate, ranks them, prints the plan, and writes all of it as data, as a simulated schedule for Perfetto
or as a plot over lengths. Imports no torch; --plot alone needs matplotlib.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NoReturn

from sp_backend.catalog import ITEMSIZE
from sp_backend.comparison import MOST_RANKS_OF_ALL, Comparison, Question
from sp_backend.config import AUTO, LAYOUTS
from sp_backend.models.config import ModelConfig
from sp_backend.planner import OFF
from sp_backend.presets import GRAMMAR, KINDS, load_machine, preset
from sp_backend.report import as_text, size
from sp_backend.shape import ModelShape
from sp_backend.strategies import FLAGS, STRATEGIES, Options, Variant
from sp_backend.strategies.mapping import read_cycles
from sp_backend.topology import Machine
from sp_backend.written import write_json, write_plot, write_timeline

_MOST: Final = 10**9  # of tokens and sizes: sums of their products are exact
_MOST_HEADS: Final = 10_000


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage."""
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = _arguments()
    args = parser.parse_args(argv)
    if args.list_topologies:
        print(topologies())
        return 0
    gc.disable()  # plans are a million small objects, none of them in cycles
    try:
        _run(args)
    except ValueError as error:
        parser.error(" ".join(str(error).split()))
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _arguments() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m sp_backend.explain", description="Which plan suits a batch on a machine, and why.")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--topology", metavar="NAME|FILE", help="a preset such as nvlink4-8, or a JSON file")
    machine.add_argument("--list-topologies", action="store_true", help="presets, their numbers and their names")
    machine.add_argument("--sp-size", type=int, metavar="N", help="ranks (default: all of the topology's)")
    model = parser.add_argument_group("model (of one SP group: heads and parameters divided by the TP size)")
    model.add_argument("--model", metavar="FOLDER", help="take the sizes from its config.json; flags below override")
    model.add_argument("--heads", type=int, metavar="N", help="query heads")
    model.add_argument("--kv-heads", type=int, metavar="N", help="KV heads (default: as many as query heads)")
    model.add_argument("--head-dim", type=int, metavar="N", help="(default: 128)")
    model.add_argument("--layers", type=int, metavar="N", help="rank by the time of a forward pass of N layers")
    model.add_argument("--dense-params", type=float, metavar="N", help="parameters of all layers, with --layers")
    model.add_argument("--hidden-size", type=int, metavar="N", help="layout heads (default: heads x head dim)")
    model.add_argument("--dtype", choices=tuple(ITEMSIZE), help="(default: bfloat16)")
    batch = parser.add_argument_group("batch")
    batch.add_argument("--new-tokens", type=int, nargs="+", metavar="N", help="of each prompt")
    batch.add_argument("--cached-tokens", type=int, nargs="+", metavar="N", help="of each prompt (default: none)")
    batch.add_argument("--page-size", type=int, default=64, metavar="TOKENS", help="(default: 64)")
    batch.add_argument("--mask", choices=("causal", "full"), default="causal")
    plans = parser.add_argument_group("plans")
    plans.add_argument("--sp-layout", choices=LAYOUTS, default="tokens")
    plans.add_argument(
        "--strategy", "--sp-strategy", metavar="S", help="show this one, or a plan as the ranking names it"
    )
    plans.add_argument("--sp-degree", type=int, metavar="N", help="ranks that share a prompt (default: all)")
    plans.add_argument("--sp-window-size", type=int, metavar="N", help="double_ring: ranks of an inner ring")
    plans.add_argument("--sp-ulysses-degree", type=int, metavar="N", help="hybrid: ranks that trade heads")
    plans.add_argument("--sp-ring-inside", action="store_true", help="hybrid: neighbours form the rings")
    plans.add_argument(
        "--sp-num-rings", type=int, metavar="N", help="hamilton: rings that each carry a piece of the keys"
    )
    plans.add_argument("--sp-ranks-per-node", type=int, metavar="N", help="hamilton: links between nodes once a step")
    plans.add_argument("--sp-redundant-kv", action="store_true", help="sharded_q: each rank computes all new keys")
    plans.add_argument("--sp-mapping", metavar="FILE", help="hamilton: rings of your own")
    plans.add_argument("--all", action="store_true", help=f"every variant, of more than {MOST_RANKS_OF_ALL} ranks too")
    output = parser.add_argument_group("output")
    output.add_argument("--table", action="store_true", help="the whole plan, however large")
    output.add_argument("--json", type=Path, metavar="FILE", help="everything as data")
    output.add_argument("--timeline", type=Path, metavar="FILE", help="simulated schedule for ui.perfetto.dev")
    output.add_argument("--plot", type=Path, metavar="FILE", help="predicted time against length, all strategies")
    return parser


def _run(args: argparse.Namespace) -> None:
    is_long = args.all or args.plot is not None or args.strategy is not None
    comparison = Comparison(_question(args), _bar if is_long else iter)
    written = []
    for flag, write in (("--json", write_json), ("--timeline", write_timeline), ("--plot", write_plot)):
        file = getattr(args, flag.removeprefix("--"))
        if file is not None:
            try:
                written.append(f"{file}: {write(comparison, file)}")
            except OSError as error:
                raise ValueError(f"{flag} {file}: cannot be written: {error.strerror}") from error
    print("\n\n".join([as_text(comparison, whole_plan=args.table), *written]), flush=True)


def _bar(variants: Sequence[Variant]) -> Iterator[Variant]:
    """Goes through them with a bar on a terminal, which names the one at work."""
    from tqdm import tqdm  # here, as a quick question needs none

    with tqdm(total=len(variants), unit="plan", disable=None, leave=False) as bar:
        for variant in variants:
            bar.set_postfix_str(str(variant))
            yield variant
            bar.update()


# From flags to a question


def _question(args: argparse.Namespace) -> Question:
    if args.topology is None:
        raise ValueError("--topology is missing: a JSON file or a preset such as nvlink4-8 (see --list-topologies)")
    shape = _shape(args)
    machine = _machine(args)
    question = Question(
        machine=machine,
        shape=shape,
        batch=_batch(args),
        layout=args.sp_layout,
        causal=args.mask == "causal",
        page_size=_in_range(1, "--page-size", args.page_size),
        every_option=args.all,
        whole_step=args.model is not None or args.layers is not None,
    )
    return replace(question, forced=_forced(args, question))


def _machine(args: argparse.Namespace) -> Machine:
    if args.sp_size is not None:
        _in_range(1, "--sp-size", args.sp_size)
    try:
        return load_machine(args.topology, args.sp_size)
    except ValueError as error:
        told = str(error).removeprefix(f"{args.topology}: ")
        raise ValueError(f"--topology {args.topology}: {told}") from error


def _shape(args: argparse.Namespace) -> ModelShape:
    sizes = _sizes(args)
    for name in ("heads", "kv_heads", "head_dim", "layers", "hidden_size"):
        _in_range(1, f"--{name.replace('_', '-')}", sizes[name], _MOST_HEADS if "heads" in name else _MOST)
    if sizes["heads"] % sizes["kv_heads"]:
        raise ValueError(
            f"--kv-heads {sizes['kv_heads']} does not divide --heads {sizes['heads']}: a KV head serves equally many"
        )
    dense = sizes["dense_params"]
    if not 0 <= dense < math.inf:
        raise ValueError(f"--dense-params {dense}: a number, at least 0, is needed")
    if dense and args.model is None and args.layers is None:
        raise ValueError("--dense-params needs --layers: they are the parameters of all layers")
    of_kv = 2 * sizes["layers"] * sizes["hidden_size"] * sizes["kv_heads"] * sizes["head_dim"]
    if args.sp_layout == "heads" and args.layers is not None and dense < of_kv:
        raise ValueError(
            f"--dense-params {dense:g}: layout heads needs at least the projections to keys and values, {of_kv:g} for "
            f"--layers {sizes['layers']} of --hidden-size {sizes['hidden_size']}"
        )
    return ModelShape(
        num_heads=sizes["heads"],
        num_kv_heads=sizes["kv_heads"],
        head_dim=sizes["head_dim"],
        num_layers=sizes["layers"],
        itemsize=ITEMSIZE[sizes["dtype"]],
        dense_flops=2 * dense,
        kv_flops=2 * of_kv,
    )


def _sizes(args: argparse.Namespace) -> dict[str, Any]:
    """The flags given, over the model's sizes."""
    sizes: dict[str, Any] = {"head_dim": 128, "layers": 1, "dense_params": 0.0, "dtype": "bfloat16"}
    if args.model is not None:
        model = _model(args.model)
        sizes = {"heads": model.num_heads, "kv_heads": model.num_kv_heads, "head_dim": model.head_dim}
        sizes |= {"layers": model.num_layers, "hidden_size": model.hidden_size, "dtype": model.dtype}
        sizes["dense_params"] = model.layer_parameters * (args.layers or model.num_layers)
    names = ("heads", "kv_heads", "head_dim", "layers", "hidden_size", "dense_params", "dtype")
    sizes |= {name: value for name in names if (value := getattr(args, name)) is not None}
    if "heads" not in sizes:
        raise ValueError("--heads is missing: give the model's query heads, or --model FOLDER")
    return {"kv_heads": sizes["heads"], "hidden_size": sizes["heads"] * sizes["head_dim"]} | sizes


def _model(folder: str) -> ModelConfig:
    try:
        model = ModelConfig.load(folder)
    except ValueError as error:
        raise ValueError(f"--model: {error}") from error
    if any(model.windows):
        print(f"note: --model {folder} has sliding windows; its layers are costed as full attention", file=sys.stderr)
    return model


def _batch(args: argparse.Namespace) -> list[tuple[int, int]]:
    if args.new_tokens is None:
        raise ValueError("--new-tokens is missing: the tokens of each prompt that are not cached")
    cached = args.cached_tokens or [0] * len(args.new_tokens)
    if len(cached) != len(args.new_tokens):
        raise ValueError(
            f"--cached-tokens has {len(cached)} numbers and --new-tokens {len(args.new_tokens)}: one for each prompt"
        )
    for new, old in zip(args.new_tokens, cached, strict=True):
        _in_range(1, "--new-tokens", new)
        _in_range(0, "--cached-tokens", old)
    return list(zip(args.new_tokens, cached, strict=True))


def _forced(args: argparse.Namespace, question: Question) -> Variant | None:
    num_ranks = question.machine.num_ranks
    options = Options(
        window_size=args.sp_window_size,
        ulysses_degree=args.sp_ulysses_degree,
        ring_inside=args.sp_ring_inside,
        num_rings=args.sp_num_rings,
        ranks_per_node=args.sp_ranks_per_node,
        redundant_kv=args.sp_redundant_kv,
        cycles=None if args.sp_mapping is None else read_cycles(args.sp_mapping),
    )
    given = [FLAGS.get(name, f"--sp-{name.replace('_', '-')}") for name in options.given()]
    given += ["--sp-degree"] * (args.sp_degree is not None)
    if args.strategy in (None, AUTO):
        if given:
            raise ValueError(f"{given[0]} needs a --strategy that takes it")
        return None
    named = {str(v): v for v in question.variants()}
    if args.sp_layout == "tokens":
        named["off"] = OFF  # as the server's command line has it
    if args.strategy in named and not given:
        return named[args.strategy]
    fitting = [name for name, row in STRATEGIES.items() if row.layout == args.sp_layout]
    if args.strategy not in fitting:
        raise ValueError(
            f"--strategy {args.strategy}: not a strategy of --sp-layout {args.sp_layout} ({', '.join(fitting)}), "
            "nor a plan as the ranking names it"
        )
    degree = num_ranks if args.sp_degree is None else args.sp_degree
    if degree < 1 or num_ranks % degree:
        fit = ", ".join(str(d) for d in range(1, num_ranks + 1) if num_ranks % d == 0)
        raise ValueError(f"--sp-degree {degree}: {num_ranks} ranks cannot be divided so; degrees that fit: {fit}")
    return Variant(args.strategy, options, None if degree == num_ranks else degree)


def _in_range(least: int, flag: str, value: int, most: int = _MOST) -> int:
    if value < least:
        raise ValueError(f"{flag} {value}: at least {least} is needed")
    if value > most:
        raise ValueError(f"{flag} {value}: at most {most:,} is possible")
    return value


def topologies() -> str:
    """The kinds of presets, with the numbers that predictions for them use, and how names are made."""
    rows = [["kind", "a rank's port", "latency", "attention", "all else", "memory"]]
    for kind in KINDS:
        machine = preset(f"{kind}-2")
        link, rates = machine.topology.links[0], machine.rates
        port = machine.topology.resources[link.resources[0]]
        flops = (f"{float(f'{x / 1e12:.3g}'):g} TFLOP/s" for x in (max(map(max, rates.kernel.full)), rates.dense_flops))
        rows.append([kind, f"{size(port)}/s", f"{link.latency * 1e6:.0f} us", *flops, f"{size(rates.memory_bytes)}/s"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", f"names: {GRAMMAR}"])


if __name__ == "__main__":
    sys.exit(main())
