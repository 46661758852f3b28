"""The import line server -> scheduler -> sp_backend, and where torch may appear."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("server", "scheduler", "sp_backend")
PURE = {  # what the scheduler may use
    "sp_backend",
    "sp_backend.calls",
    "sp_backend.clock",
    "sp_backend.commands",
    "sp_backend.comparison",
    "sp_backend.config",
    "sp_backend.cost",
    "sp_backend.explain",
    "sp_backend.flow",
    "sp_backend.forms",
    "sp_backend.grouping",
    "sp_backend.layout",
    "sp_backend.planner",
    "sp_backend.presets",
    "sp_backend.report",
    "sp_backend.script",
    "sp_backend.shape",
    "sp_backend.simulate",
    "sp_backend.topology",
    "sp_backend.trace",
    "sp_backend.work",
}
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    """Every module that a file names in an import, also inside functions."""
    found: set[str] = set()
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            found.add(module)
            found.update(f"{module}.{alias.name}" for alias in node.names)
    return found


def is_module(name: str) -> bool:
    """Rather than something that a module defines."""
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").exists()


def within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_the_line_only(path: Path) -> None:
    above = PACKAGES[: PACKAGES.index(path.relative_to(ROOT).parts[0])]
    assert not [module for module in imports(path) if within(module, above)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_transport_worker_and_its_trials_use_torch_distributed(path: Path) -> None:
    where = path.relative_to(ROOT).with_suffix("").parts
    if where[:2] not in {("sp_backend", "transport"), ("sp_backend", "worker"), ("sp_backend", "trials")}:
        assert not [module for module in imports(path) if within(module, ("torch.distributed",))]


def test_the_scheduler_uses_only_pure_modules_of_the_backend() -> None:
    for path in (ROOT / "scheduler").glob("*.py"):
        used = {module for module in imports(path) if within(module, ("sp_backend",)) and is_module(module)}
        assert used <= PURE, path


@pytest.mark.parametrize("packages", [("server",), ("scheduler",), ("sp_backend",)])
def test_importing_a_package_loads_no_torch(packages: tuple[str, ...]) -> None:
    check_without_torch(list(packages))


def test_no_module_of_the_scheduler_loads_torch() -> None:
    modules = [f"scheduler.{path.stem}" for path in (ROOT / "scheduler").glob("*.py") if path.stem != "__init__"]
    check_without_torch([*modules, *sorted(PURE)])


def test_no_module_that_calls_itself_pure_loads_torch() -> None:
    told = {path: " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split()) for path in FILES}
    names = [path.relative_to(ROOT).with_suffix("").parts for path, text in told.items() if "Pure: no torch" in text]
    assert ("sp_backend", "strategies", "__init__") in names
    check_without_torch([".".join(name) for name in names])


def check_without_torch(modules: list[str]) -> None:
    code = f"import sys, importlib; [importlib.import_module(m) for m in {modules}]; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or "torch was imported"
