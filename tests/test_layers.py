"""The map of docs: which wing may import which, and how large a file and a function may be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WINGS = ("common", "learners", "tasks", "evaluation", "training", "commands")
DOORS = ("learner", "dataset", "maml", "main")
# What each part may import; itself is understood.
MAY_IMPORT = {
    "common": set(),
    "learners": {"common"},
    "tasks": {"common"},
    "learner": {"common", "learners"},
    "dataset": {"common", "tasks"},
    "maml": {"common", "learners"},
    "evaluation": {"common", "learners", "maml"},
    "training": {"common", "learners", "maml", "evaluation"},
    "commands": {"common", "learners", "tasks", "learner", "dataset", "maml", "evaluation", "training"},
    "main": {"common", "commands"},
}
LIGHT = {"options", "choices", "errors", "config", "call", "rules", "resolve", "parser", "presets", "names"}
HEAVY = ("torch", "numpy", "PIL", "matplotlib")
MOST_LINES, MOST_LINES_OF_FUNCTION, MOST_ENTRIES = 450, 50, 20

FILES = [ROOT / f"{door}.py" for door in DOORS] + [
    file for wing in WINGS for file in sorted((ROOT / wing).rglob("*.py"))
]
MODULES = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in FILES}


def imports_of(name: str) -> set[str]:
    """Return the modules of this project that a module imports anywhere, in functions and for types too."""
    imported: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            imported |= submodules or {node.module}
    return imported & MODULES.keys()


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_from_the_layers_below(name):
    part = name.partition(".")[0]
    allowed = MAY_IMPORT[part] | {part}
    assert {module for module in imports_of(name) if module.partition(".")[0] not in allowed} == set()


def test_no_module_imports_itself_through_others():
    below = {name: imports_of(name) for name in MODULES}
    while free := {name for name, modules in below.items() if not modules}:
        below = {name: modules - free for name, modules in below.items() if name not in free}
    assert below == {}


def test_flags_are_checked_without_heavy_packages():
    light = [name for name in MODULES if name.rpartition(".")[2] in LIGHT] + ["commands.members", "main"]
    code = f"import sys, {', '.join(light)}; print(*({set(HEAVY)} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_the_top_level_fits_on_a_screen_and_init_files_are_empty():
    assert [wing for wing in WINGS if (ROOT / wing / "__init__.py").read_text()] == []
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    entries = {line.partition("/")[0] for line in tracked.stdout.splitlines()}
    assert len([entry for entry in entries if not entry.startswith(".")]) <= MOST_ENTRIES


def test_files_and_functions_are_short():
    too_long = set()
    for name, file in MODULES.items():
        text = file.read_text()
        nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
        lengths = {f"{name}.{node.name}": (node.end_lineno or 0) - node.lineno + 1 for node in nodes}
        too_long |= {function for function, lines in lengths.items() if lines > MOST_LINES_OF_FUNCTION}
        too_long |= {name} if len(text.splitlines()) > MOST_LINES else set()
    assert too_long == set()
