"""The command line: names that users of SGLang and vLLM type, and mistakes found before anything starts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import server.machine
from server.arguments import DEFAULT_MODEL, ELSEWHERE, UsageError, parse
from server.config import load


@pytest.fixture(autouse=True)
def many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.machine, "num_cores", lambda: 12)


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--sp 2", "sp_size", 2),
        ("--sp-size 2", "sp_size", 2),
        ("--sp_size=2", "sp_size", 2),
        ("--sequence-parallel-size 2", "sp_size", 2),
        ("--context-parallel-size 2", "sp_size", 2),
        ("--cp 2", "sp_size", 2),
        ("--cp-size 2", "sp_size", 2),
        ("--tp 2", "tp_size", 2),
        ("--tp_size 2", "tp_size", 2),
        ("--tensor-parallel-size 2", "tp_size", 2),
        ("--tensor-parallel 2", "tp_size", 2),
        ("--model some/folder", "model_path", "some/folder"),
        ("--model-path some/folder", "model_path", "some/folder"),
        ("--model_path some_folder", "model_path", "some_folder"),
        ("--model_path=some_folder", "model_path", "some_folder"),
        ("-m some/folder", "model_path", "some/folder"),
        ("--max-num-seqs 3", "max_running_requests", 3),
        ("--max-running 3", "max_running_requests", 3),
        ("--max-model-len 4k", "context_length", 4000),
        ("--context-length 4K", "context_length", 4096),
        ("--max-total-tokens 128k", "max_total_tokens", 128_000),
        ("--max-total-tokens 1.5m", "max_total_tokens", 1_500_000),
        ("--gpu-memory-utilization 0.3", "mem_fraction_static", 0.3),
        ("--mem-fraction-static .3", "mem_fraction_static", 0.3),
        ("--no-enable-prefix-caching", "disable_radix_cache", True),
        ("--disable-radix-cache", "disable_radix_cache", True),
        ("--max-num-batched-tokens 4k", "chunked_prefill_size", 4000),
        ("--block-size 16", "page_size", 16),
        ("--chunked-prefill-size -1", "chunked_prefill_size", -1),
        ("--shutdown-timeout 3", "drain_timeout", 3.0),
        ("--log-level INFO", "log_level", "info"),
        ("--enable-log-requests", "log_requests", True),
        ("--served-model-name a b", "served_model_name", ["a", "b"]),
        ("--port 0", "port", 0),
        ("--sp-mask full", "sp_mask", "full"),
        ("--pooling mean", "pooling", "mean"),
    ],
)
def test_names_that_users_type(words: str, name: str, value: object) -> None:
    assert getattr(parse(words.split()), name) == value


@pytest.mark.parametrize("flag", ELSEWHERE)
def test_flags_that_users_bring_along_are_answered(flag: str) -> None:
    with pytest.raises(UsageError, match=f"{flag}: {ELSEWHERE[flag]}"):
        parse([flag])


def test_intervals_of_the_log() -> None:
    assert load(["--decode-log-interval", "7"]).scheduler.decode_log_interval == 7


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        parse(["--version"])
    assert ending.value.code == 0 and capsys.readouterr().out.startswith("sp-serve ")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("--sp-size 16", ["--sp-size 16", "--tp-size 1", "16 cores", "12", "--oversubscribe"]),
        ("--sp-size 0", ["--sp-size 0", "at least 1"]),
        ("--max-total-tokens lots", ["--max-total-tokens", "'lots'", "4096 or 128k"]),
        ("--max-total-tokens infk", ["--max-total-tokens", "'infk'", "4096 or 128k"]),
        ("--decode-log-interval 0", ["--decode-log-interval 0", "at least 1"]),
        ("--ssl-keyfile key.pem", ["--ssl-keyfile needs --ssl-certfile"]),
        ("--ssl-certfile nowhere.pem", ["--ssl-certfile nowhere.pem", "No such file"]),
        (f"--ssl-certfile {__file__}", [f"--ssl-certfile {__file__}", "PEM"]),
        ("--enable-metrics --revision=main", ["--enable-metrics: leave it out", "--revision: models are local"]),
        ("--dp-size 2 --sp 2", ["--dp-size: start a server for each"]),
        ("--tp-size 3", ["--tp-size 3", "12 query heads", "4 KV heads"]),
        ("--sp-size 5 --sp-layout heads", ["--sp-size 5", "--sp-layout heads", "12 query heads"]),
        ("--sp 2 --sp-strategy sharded_q", ["--sp-strategy sharded_q", "--sp-layout tokens", "ring_pass_kv"]),
        ("--sp 2 --sp-layout heads --sp-strategy token_ring", ["--sp-strategy token_ring", "--sp-layout heads"]),
        ("--sp 2 --sp-strategy off --sp-threshold 9", ["--sp-threshold", "--sp-strategy off"]),
        ("--sp 2 --sp-strategy off --sp-layout heads", ["--sp-strategy off", "--sp-layout heads"]),
        ("--sp 2 --sp-window-size 2", ["--sp-window-size", "--sp-strategy", "auto"]),
        ("--sp 2 --sp-strategy token_ring --sp-num-rings 1", ["--sp-num-rings", "token_ring", "hamilton"]),
        ("--sp 4 --oversubscribe --sp-strategy hybrid --sp-ulysses-degree 3", ["--sp-ulysses-degree", "1, 2, 4"]),
        ("--sp 4 --oversubscribe --sp-strategy hamilton --sp-mapping /no/file", ["--sp-mapping", "/no/file"]),
        ("--sp 2 --sp-topology abacus-2", ["--sp-topology", "abacus-2", "nvlink4-8"]),
        ("--sp 16 --oversubscribe --sp-topology nvlink4-8", ["--sp-topology", "8 ranks", "16"]),
        ("--sp 2 --sp-redundant-kv", ["--sp-redundant-kv", "--sp-layout heads"]),
        ("--device cuda", ["--device cuda", "cpu"]),
        ("--model-path /no/such/folder", ["--model-path /no/such/folder", "no such folder"]),
        ("--tokenizer-path /no/such/folder", ["--tokenizer-path /no/such/folder", "tokenizer.json"]),
        ("--chat-template /no/such/file", ["--chat-template /no/such/file"]),
        ("--context-length 200000", ["--context-length 200000", "131072"]),
        ("--mem-fraction-static 1.5", ["--mem-fraction-static 1.5", "between 0 and 1"]),
        ("--mem-fraction-static 1e-9", ["--mem-fraction-static", "weights"]),
        ("--chunked-prefill-size 10", ["--chunked-prefill-size 10", "--page-size 64"]),
        ("--dist-timeout 0", ["--dist-timeout 0", "positive"]),
        ("--max-queued-requests -1", ["--max-queued-requests -1", "negative"]),
        ("--port 70000", ["--port 70000"]),
        ("--dtype int8", ["--dtype", "int8"]),
        ("--max-total-tokens many", ["--max-total-tokens", "many"]),
        ("--no-such-flag", ["--no-such-flag"]),
        ("--s 2", ["ambiguous", "--s"]),
    ],
)
def test_mistakes_are_one_line_that_names_the_flags(words: str, parts: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        load(words.split())
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


def test_oversubscription_can_be_asked_for() -> None:
    assert load(["--sp", "16", "--oversubscribe"]).backend.num_threads == 1


def test_defaults_are_resolved() -> None:
    config = load([])
    assert config.backend.model_path == str(DEFAULT_MODEL)
    assert config.backend.dtype in ("bfloat16", "float32")
    assert config.backend.num_threads == 12
    assert config.backend.strategy == "auto"
    assert config.backend.num_pages is None and (config.backend.kv_memory_bytes or 0) > 2**20
    assert config.backend.context_length == config.model.max_position_embeddings
    assert config.http.served_model_names == ("default",)
    assert config.warmup and config.warnings == ()


def test_layout_heads_has_its_own_strategy() -> None:
    assert str(load(["--sp", "2", "--sp-layout", "heads"]).backend.variant) == "sharded_q"


def test_a_strategy_takes_its_options() -> None:
    flags = (
        "--sp 4 --oversubscribe --sp-strategy double_ring --sp-window-size 2 --sp-overlap off --sp-topology nvlink4-8"
    )
    backend = load(flags.split()).backend
    assert (str(backend.variant), backend.overlap) == ("double_ring(window_size=2)", False)
    assert backend.topology == "nvlink4-8"


def test_off_shares_no_prompt() -> None:
    config = load(["--sp", "2", "--sp-strategy", "off"])
    assert config.scheduler.sp_threshold == config.backend.context_length + 1


def test_a_mapping_file_gives_the_rings(tmp_path: Path) -> None:
    file = tmp_path / "rings.json"
    rings = {"path_num": 1, "in_mapping": [[-1, 0], [0, -1]], "out_mapping": [[-1, 0], [0, -1]]}
    file.write_text(json.dumps(rings))
    backend = load(["--sp", "2", "--oversubscribe", "--sp-strategy", "hamilton", "--sp-mapping", str(file)]).backend
    assert backend.options.cycles == ((0, 1),)


def test_total_tokens_are_shared_by_sp_ranks() -> None:
    config = load(["--sp", "2", "--tp", "2", "--max-total-tokens", "128k", "--page-size", "32"])
    assert config.backend.num_pages == 2000  # per rank
    assert config.backend.kv_memory_bytes is None


def test_memory_is_shared_by_all_ranks() -> None:
    one, four = load([]).backend.kv_memory_bytes, load(["--sp", "2", "--tp", "2"]).backend.kv_memory_bytes
    assert one is not None and four is not None
    assert four == pytest.approx(one / 4, rel=0.1)


def test_scheduler_gets_its_flags() -> None:
    words = "--max-running-requests 3 --max-queued-requests 4 --chunked-prefill-size 128 --sp-threshold 9"
    scheduler = load([*words.split(), "--disable-radix-cache", "--watchdog-timeout", "7"]).scheduler
    assert (scheduler.max_running_requests, scheduler.max_queued_requests) == (3, 4)
    assert (scheduler.chunked_prefill_size, scheduler.sp_threshold) == (128, 9)
    assert not scheduler.prefix_cache and scheduler.watchdog_timeout == 7


def test_options_without_effect_warn() -> None:
    (warning,) = load(["--sp-strategy", "token_ring"]).warnings
    assert "--sp-strategy" in warning and "--sp-size 1" in warning


def test_model_names_default_to_the_path(tmp_path: Path) -> None:
    folder = copy_of_default_model(tmp_path / "Tiny-1B")
    assert load(["-m", str(folder)]).http.served_model_names == (str(folder), "Tiny-1B")
    assert load(["-m", str(folder), "--served-model-name", "x"]).http.served_model_names == ("x",)


@pytest.mark.parametrize(
    ("generation_config", "arguments", "defaults"),
    [
        ({"temperature": 0.6, "top_k": 20, "do_sample": True}, "", {"temperature": 0.6, "top_k": 20}),
        ({"temperature": 0.6, "do_sample": False}, "", {"temperature": 0.0}),
        ({"temperature": 0.6}, "--sampling-defaults openai", {}),
        ({"temperature": None, "eos_token_id": 1}, "", {}),
    ],
)
def test_sampling_defaults(tmp_path: Path, generation_config: Any, arguments: str, defaults: Any) -> None:
    folder = copy_of_default_model(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps(generation_config))
    assert load(["-m", str(folder), *arguments.split()]).text.sampling_defaults == defaults


def test_summary_has_no_secrets() -> None:
    assert "hunter2" not in json.dumps(load(["--api-key", "hunter2"]).summary())


def test_help_lists_every_option_and_import_is_light() -> None:
    script = "import server.launch, sys; assert 'torch' not in sys.modules; server.launch.main(['--help'])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--sp-size" in done.stdout and "--sequence-parallel-size" in done.stdout


def copy_of_default_model(folder: Path) -> Path:
    folder.mkdir()
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEFAULT_MODEL / name, folder)
    return folder
