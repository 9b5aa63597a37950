"""The layers in pyproject.toml: which part may import which. And how large a file and a function may be."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAYERS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["layers"]
PARTS: dict[str, list[str]] = LAYERS["parts"]
COMMANDS: dict[str, list[str]] = LAYERS["commands"]
STANDARD: list[str] = LAYERS["standard"]
LIGHT = {"options", "choices", "errors", "config", "call", "rules", "resolve", "settings", "parser"}
LIGHT |= {"presets", "names"}
HEAVY = ("torch", "numpy", "PIL", "matplotlib")
MOST_LINES, MOST_LINES_OF_FUNCTION, MOST_ENTRIES = 450, 50, 22

WINGS = [init.parent for init in ROOT.glob("*/__init__.py")]
FILES = [*ROOT.glob("*.py"), *(file for wing in WINGS for file in wing.rglob("*.py"))]
MODULES = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in sorted(FILES)}


def all_imports_of(name: str) -> set[str]:
    """Return the modules that a module imports anywhere, in functions and for types too."""
    imported: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            imported |= submodules or {node.module}
    return imported


def imports_of(name: str) -> set[str]:
    """Return the modules of this project that a module imports."""
    return all_imports_of(name) & MODULES.keys()


def part_of(module: str) -> str:
    return module.partition(".")[0]


def test_a_module_imports_only_from_the_layers_below():
    wrong = set()
    for name in MODULES:
        allowed = {part_of(name), *PARTS[part_of(name)]}
        wrong |= {(name, m) for m in imports_of(name) if not {m, part_of(m)} & allowed}
    assert wrong == set()


def test_a_command_imports_the_commands_that_it_consists_of_and_no_other():
    imported = {name: imports_of(f"commands.{name}") for name in COMMANDS}
    others = {name: {m.removeprefix("commands.") for m in modules} for name, modules in imported.items()}
    assert {name: others[name] & COMMANDS.keys() for name in COMMANDS} == {
        name: {*commands} for name, commands in COMMANDS.items()
    }


def test_errors_and_options_import_the_standard_library_alone():
    imported = set().union(*map(all_imports_of, STANDARD)) - {*STANDARD}
    assert {module for module in imported if part_of(module) not in sys.stdlib_module_names} == set()


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
    assert [wing for wing in WINGS if (wing / "__init__.py").read_text()] == []
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
