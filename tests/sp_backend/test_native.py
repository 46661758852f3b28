"""Compiling the C++ operators: once for many processes, kept, and with a reason where it cannot be done."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sp_backend import native

TINY = 'extern "C" int tiny() { return 1; }'


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source of one function, an empty cache folder, and nothing remembered in this process."""
    source = tmp_path / "source" / "tiny.cpp"
    source.parent.mkdir()
    source.write_text(TINY)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "__file__", str(source.with_name("__init__.py")))
    monkeypatch.setitem(native.SOURCES, "tiny", frozenset())
    monkeypatch.setattr(native, "library", native.library.__wrapped__)
    return source


def test_it_is_compiled_once_and_again_when_the_source_changes(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first = native.library("tiny")
    assert "compiling tiny.cpp" in capfd.readouterr().err
    assert native.library("tiny") == first
    assert capfd.readouterr().err == ""
    tiny.write_text(TINY + "// changed")
    assert native.library("tiny") != first
    assert sorted(p.suffix for p in first.parent.iterdir()) == [".lock", ".lock", ".so", ".so"]


def test_processes_that_start_together_compile_once(tiny: Path) -> None:
    script = (
        "from sp_backend import native; native.SOURCES['tiny'] = frozenset(); "
        f"native.__file__ = {str(tiny.with_name('__init__.py'))!r}; native.library('tiny')"
    )

    def run(_: int) -> str:
        return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stderr

    with ThreadPoolExecutor() as threads:
        assert sum("compiling" in text for text in threads.map(run, range(3))) == 1


def test_a_machine_that_cannot_compile_says_why(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.write_text("int main( {")
    with pytest.raises(native.Unavailable, match=r"failed on tiny.cpp: .*error"):
        native.library("tiny")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(native.Unavailable, match="no C.. compiler: install g.., or name one in CXX"):
        native.library("tiny")
    monkeypatch.setitem(native.SOURCES, "tiny", frozenset({"avx4096", "avx8192"}))
    with pytest.raises(native.Unavailable, match="this CPU lacks avx4096, avx8192"):
        native.library("tiny")


def test_a_cache_folder_that_cannot_be_written_is_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tiny))  # a file
    with pytest.raises(native.Unavailable, match="cannot be written: .*; set XDG_CACHE_HOME"):
        native.library("tiny")


def test_without_a_compiler_the_kernel_of_torch_is_chosen(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setitem(native.SOURCES, "attention", frozenset())
    assert native.choose_kernel()[0] == "torch_cpu"
    assert "no C++ compiler" in native.choose_kernel()[1]


@pytest.mark.parametrize("source", list(native.SOURCES))
def test_every_source_compiles_and_loads_where_the_cpu_can_run_it(source: str) -> None:
    """Elsewhere tests of the native kernels are skipped; a source that no longer compiles must not skip them too."""
    if native.SOURCES[source] <= set(native._cpu().split()):
        native.load(source)
    else:
        with pytest.raises(native.Unavailable, match="this CPU lacks"):
            native.load(source)
