"""What README.md and docs/ say of flags, files, names and links, against the code."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import pytest

from colonnade.command_settings import ResumeSettings
from colonnade.run_settings import RunSettings

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = (
    ["training.py"],
    ["resume_pretrain_tensor.py"],
    ["generate.py"],
    ["export_hf.py"],
    ["audit_run.py"],
    ["check_bits.py"],
    ["plan_run.py"],
    ["check_parity.py"],
    ["evaluate.py"],
    ["benchmarks/checkpoint.py"],
    ["benchmarks/data.py"],
    ["benchmarks/data_memory.py"],
    ["benchmarks/export.py"],
    ["benchmarks/generation.py"],
    ["benchmarks/step.py"],
    ["benchmarks/gpu_step.py"],
    ["benchmarks/packing.py"],
    ["benchmarks/document_mask.py"],
    ["benchmarks/overlap.py"],
    ["benchmarks/activation_checkpointing.py"],
    ["-m", "colonnade.data.sample_corpus"],
    ["-m", "colonnade.telemetry.report"],
)

# Of sbatch and srun (Slurm 24.05), which are not here to be asked.
SLURM = {
    *("--job-name", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--time", "--requeue"),
    *("--open-mode", "--signal", "--kill-on-bad-exit"),
}
# Of tensorboard.
VIEWERS = {"--logdir"}
# What these folders hold is in the repository; other paths in the docs belong to a user's machine.
FOLDERS = ("colonnade/", "tests/", "docs/", "presets/", "benchmarks/", "run/", ".ci/")
SUFFIXES = (".py", ".md", ".toml", ".txt")


def fences_removed(text: str) -> str:
    """`text` without its blocks of commands and output."""
    kept, inside = [], False
    for line in text.splitlines():
        if line.startswith("```"):
            inside = not inside
        elif not inside and not line.startswith("    "):
            kept.append(line)
    return "\n".join(kept)


def spans(page: Path) -> Iterator[str]:
    """What stands in single backticks, outside of blocks."""
    yield from re.findall(r"`([^`\n]+)`", fences_removed(page.read_text(encoding="utf-8")))


# --- flags -----------------------------------------------------------------------------------------------------------


def row(spec: Field[Any]) -> str:
    default = "" if spec.default in (None, "", False) else f"`{spec.default}`"
    kept = "yes" if spec.metadata.get("identity") else ""
    return f"| `--{spec.name.replace('_', '-')}` | {default} | {kept} | {spec.metadata['help'].replace('|', '/')} |"


def flags_table() -> str:
    """The table of flags in the README, from the fields that the parsers are made from."""
    lines = ["| flag | default | fixed for a run | what |", "| --- | --- | --- | --- |"]
    group = None
    for spec in (*fields(RunSettings), *fields(ResumeSettings)):
        if spec.metadata["group"] != group:
            group = spec.metadata["group"]
            lines.append(f"| **{group}** | | | |")
        lines.append(row(spec))
    return "\n".join(lines)


def test_the_flags_table_is_the_settings() -> None:
    expected = flags_table()
    assert expected in (ROOT / "README.md").read_text(encoding="utf-8"), (
        f"the table in README.md should be:\n{expected}"
    )


def flags_of_help(command: list[str]) -> set[str]:
    done = subprocess.run([sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(re.findall(r"--[a-z][a-z0-9-]*", done.stdout))


@pytest.fixture(scope="module")
def own_flags() -> dict[str, set[str]]:
    return {command[-1]: flags_of_help(command) for command in COMMANDS}


def test_the_table_leaves_no_flag_out(own_flags: dict[str, set[str]]) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for script in ("training.py", "resume_pretrain_tensor.py"):
        # A switch has a --no- form, which the README tells once for all.
        listed = {flag for flag in own_flags[script] if not flag.startswith("--no-")}
        missing = {flag for flag in listed if f"`{flag}`" not in readme}
        assert not missing - {"--help"}, script


def test_every_flag_in_the_docs_exists(own_flags: dict[str, set[str]]) -> None:
    from torch.distributed.run import get_args_parser

    # torch 2.12 and later have this one.
    torchrun = {"--shutdown-timeout", *(name.replace("_", "-") for name in get_args_parser()._option_string_actions)}
    known = torchrun.union(SLURM, VIEWERS, *own_flags.values())
    for page in PAGES:
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*", page.read_text(encoding="utf-8")))
        unknown = {flag for flag in named if flag.replace("_", "-") not in known}
        assert not unknown, page.name


# --- files, names, links ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_named_exists(page: Path) -> None:
    paths = {span for span in spans(page) if re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", span)}
    named = {path for path in paths if path.startswith(FOLDERS) or (path.endswith(SUFFIXES) and path not in SUFFIXES)}
    assert named, "no file is named"
    assert not {path for path in named if not (ROOT / path).exists()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_name_in_backticks_is_in_the_code(page: Path) -> None:
    sources = [path for folder in ("colonnade", "run", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    sources += [*ROOT.glob("*.py"), *(ROOT / "presets").glob("*.yaml")]
    sources += [ROOT / "Makefile", ROOT / "pyproject.toml"]
    words = set()
    for source in sources:
        if source != Path(__file__):
            words.update(re.findall(r"\w+", source.read_text(encoding="utf-8")))
    named = {span for span in spans(page) if re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", span)}
    assert not {name for name in named if not set(name.split(".")) <= words}


def anchors(page: Path) -> set[str]:
    """The anchors GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", fences_removed(page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\[[^\]]+\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_root_file_is_installed() -> None:
    listed = re.search(r"py-modules = \[(.*)\]", (ROOT / "pyproject.toml").read_text())
    assert listed is not None
    assert set(re.findall(r'"(\w+)"', listed.group(1))) == {path.stem for path in ROOT.glob("*.py")}


def test_every_test_of_the_fault_table_exists_and_no_fault_is_left_out() -> None:
    """A row names `file.py::test`, in tests/faults/ or from tests/ on."""
    named = set(re.findall(r"`([\w/]+\.py)::(\w+)`", (ROOT / "docs" / "reliability.md").read_text()))
    for file, test in named:
        path = ROOT / "tests" / file if "/" in file else ROOT / "tests" / "faults" / file
        assert re.search(rf"^def {test}\(", path.read_text(), re.MULTILINE), f"{file}::{test}"
    # `make faults` runs them all, and what `make test` leaves out.
    listed = (ROOT / "Makefile").read_text().partition("\nfaults:")[2].partition("\n\n")[0].split()
    slow = [path for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.slow" in path.read_text()]
    wanted = {f"tests/{file}" for file, _ in named if "/" in file}
    wanted |= {path.relative_to(ROOT).as_posix() for path in slow if path != Path(__file__)}
    assert {path for path in wanted if not path.startswith("tests/faults/")} <= set(listed)
    files = {path.name for path in (ROOT / "tests" / "faults").glob("test_*.py")}
    assert files <= {file for file, _ in named}


def test_the_metrics_keys_are_those_of_a_run() -> None:
    """Against those that `tests/distributed/test_run.py` finds in rows of a real run, and those an audit compares."""
    from distributed.test_run import ROW_KEYS
    from run.audit import COMPARED

    text = (ROOT / "docs" / "usage.md").read_text(encoding="utf-8")
    section = text.partition("## Reading metrics.jsonl")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    keys = {key for cell in cells for key in re.findall(r"`(\w+)`", cell)}
    assert keys == ROW_KEYS.union(COMPARED, ("logged_after", "validation_loss", "validation_perplexity"))
