"""Imports go one way: root files and run/ -> colonnade/, and inside each only towards what comes earlier."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = "colonnade"
RUN = "run"

# A part may import itself and the parts before it.
PARTS = (
    "errors",
    "files",
    "screen",
    "cores",
    "setting_values",
    "other_names",
    "run_settings",
    "command_settings",
    "config",
    "flags",
    "model_config",
    "parallel",
    "decoder",
    "runtime",
    "data",
    "optim",
    "checkpoint",
    "tuning",
    "telemetry",
)

# A root file, or one of run/, may import those of earlier levels. What is not named here is a command: the last level.
LEVELS = (
    ("data_processing", "model"),
    ("run.text_generation",),
    ("run.samples",),
    ("run.state",),
    ("run.checks", "run.data", "run.end", "run.measurements"),
    ("training_utils",),
    ("run.batch_sizes", "run.folder"),
    ("run.inputs",),
    ("run.audit", "run.batch", "run.model", "run.plan_report", "run.report", "run.trained_model"),
    ("run.assembly", "run.model_card"),
    ("run.evaluation", "run.export", "run.parity", "run.start", "run.tasks"),
    ("run.parity_report", "run.parity_subject"),
)


def violations(root: Path) -> list[str]:
    """Every import below `root` that goes against the order, as `file:line: reason`; inside functions as well."""
    outer = [*root.glob("*.py"), *(root / RUN).glob("*.py")]
    outer_modules = {module_of(path.relative_to(root)) for path in outer}
    found = []
    for path in sorted([*outer, *(root / PACKAGE).rglob("*.py")]):
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        for line, target in imported_modules(tree, path.relative_to(root)):
            reason = refusal(path.relative_to(root), target, outer_modules)
            if reason:
                found.append(f"{path.relative_to(root).as_posix()}:{line}: {reason}")
    return found


def imported_modules(tree: ast.Module, path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of each import; `from a import b` yields `a.b`, since b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = path.parts[: len(path.parts) - node.level]
                base = ".".join([*above, *([base] if base else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args:
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            argument = node.args[0]
            if name in ("import_module", "__import__") and isinstance(argument, ast.Constant):
                yield node.lineno, str(argument.value)


def refusal(path: Path, target: str, outer_modules: set[str]) -> str | None:
    """Why the file at `path` may not import `target`, or None where it may."""
    top, *rest = target.split(".")
    outer = ".".join([top, *rest[:1]]) if top == RUN else top
    if path.parts[0] != PACKAGE:
        own = module_of(path)
        if outer in outer_modules and level(outer) >= level(own):
            return f"{own} may not import {outer}"
        return None
    if outer in outer_modules:
        return f"the package may not import {outer}"
    if top != PACKAGE:
        return None
    part = part_of(path)
    if part is not None and part not in PARTS:
        return f"{part} has no place in the order of parts"
    wanted = rest[0] if rest else None
    if wanted not in PARTS:
        return None
    # The package's own __init__ runs before any part, so it may import none of them.
    if part is None or PARTS.index(wanted) > PARTS.index(part):
        return f"{part or PACKAGE} may not import {wanted}"
    return None


def module_of(path: Path) -> str:
    """The dotted name of a root file, or of one of run/."""
    return ".".join(path.with_suffix("").parts)


def level(module: str) -> int:
    return next((i for i, names in enumerate(LEVELS) if module in names), len(LEVELS))


def part_of(path: Path) -> str | None:
    """The part a package file belongs to: `colonnade/data/x.py` and `colonnade/data.py` are in `data`."""
    part = path.parts[1].removesuffix(".py")
    return None if part == "__init__" else part


def test_imports_go_one_way() -> None:
    assert violations(REPOSITORY) == []


def test_every_part_is_in_the_order() -> None:
    run = {module_of(path.relative_to(REPOSITORY)) for path in (REPOSITORY / RUN).glob("*.py")}
    assert run - {"run.__init__"} <= {name for names in LEVELS for name in names}
    parts = {part_of(path.relative_to(REPOSITORY)) for path in (REPOSITORY / PACKAGE).rglob("*.py")}
    assert parts - {None} <= set(PARTS)
    assert len(parts) > 1


ALLOWED = {
    "data_processing.py": "import numpy\nfrom colonnade.data.shards import read\n",
    "model.py": "import colonnade.parallel.mesh\n",
    "training_utils.py": "import model\nfrom data_processing import load\n",
    "training.py": "import training_utils, model\nfrom run.start import start\n",
    "run/__init__.py": "",
    "run/state.py": "import model\n",
    "run/start.py": "from run.state import Run\nimport training_utils\n",
    "resume.py": "def main():\n    from training_utils import run\n    import data_processing\n",
    "colonnade/__init__.py": "__version__ = '1'\n",
    "colonnade/errors.py": "import sys\n",
    "colonnade/config.py": "from colonnade.errors import E\nfrom colonnade import __version__\n",
    "colonnade/parallel/mesh.py": "from . import groups\nfrom ..errors import E\n",
    "colonnade/parallel/groups.py": "import training_plots\n",
    "colonnade/telemetry/plots.py": "from colonnade import data\nfrom colonnade.telemetry.metrics import read\n",
}


def plant(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_allowed_imports_pass(tmp_path: Path) -> None:
    plant(tmp_path, ALLOWED)
    assert violations(tmp_path) == []


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("resume.py", "x = 1\nfrom training import main\n", "resume.py:2: resume may not import training"),
        ("training.py", "def f():\n    import resume\n", "training.py:2: training may not import resume"),
        ("model.py", "import data_processing\n", "model.py:1: model may not import data_processing"),
        ("model.py", "import training_utils as t\n", "model.py:1: model may not import training_utils"),
        ("training_utils.py", "import generate\n", "training_utils.py:1: training_utils may not import generate"),
        ("colonnade/data/a.py", "from model import M\n", "a.py:1: the package may not import model"),
        ("colonnade/data/a.py", "from run.state import Run\n", "a.py:1: the package may not import run.state"),
        ("run/state.py", "from run.start import start\n", "state.py:1: run.state may not import run.start"),
        ("run/state.py", "from run import start\n", "state.py:1: run.state may not import run.start"),
        ("model.py", "import run.state\n", "model.py:1: model may not import run.state"),
        ("colonnade/data/a.py", "import colonnade.optim.factory\n", "a.py:1: data may not import optim"),
        ("colonnade/data/a.py", "from colonnade import telemetry\n", "a.py:1: data may not import telemetry"),
        ("colonnade/data/a.py", "from ..optim import factory\n", "a.py:1: data may not import optim"),
        ("colonnade/data/a.py", "from .. import optim\n", "a.py:1: data may not import optim"),
        ("colonnade/data/deep/a.py", "from ...tuning import x\n", "a.py:1: data may not import tuning"),
        (
            "colonnade/data/a.py",
            "def f():\n  def g():\n    import colonnade.tuning\n",
            "a.py:3: data may not import tuning",
        ),
        (
            "colonnade/optim/a.py",
            "if TYPE_CHECKING:\n  import colonnade.checkpoint\n",
            "optim may not import checkpoint",
        ),
        ("colonnade/data/a.py", "importlib.import_module('colonnade.tuning.x')\n", "data may not import tuning"),
        ("colonnade/errors.py", "from colonnade.config import C\n", "errors.py:1: errors may not import config"),
        ("colonnade/__init__.py", "from colonnade.errors import E\n", "colonnade may not import errors"),
        ("colonnade/novel/a.py", "import colonnade.errors\n", "novel has no place in the order of parts"),
    ],
)
def test_a_violation_is_caught(file: str, text: str, reason: str, tmp_path: Path) -> None:
    plant(tmp_path, {**ALLOWED, "generate.py": "import model\n", file: text})
    found = violations(tmp_path)
    assert len(found) == 1
    assert found[0].endswith(reason)
