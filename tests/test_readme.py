"""The README is true: its commands are those that CI runs, its flags those that exist, its Python runs."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import config
import presets

README = (ROOT / "README.md").read_text()


def test_ci_runs_the_readmes_test_command():
    commands = re.findall(r"^python3 -m venv .*$", README, re.MULTILINE)
    assert len(commands) == 2 and "-m pytest" in commands[1]
    assert commands[1] in (ROOT / ".ci/run").read_text().splitlines()


def test_every_flag_is_in_the_readme_with_its_meaning_and_default(monkeypatch):
    monkeypatch.delenv("MAML_DATA_ROOT", raising=False)
    for name, declaration in config.ALL_FLAGS.items():
        flags = ", ".join(f"`{flag}`" for flag in declaration.names)
        default = "data" if name == "data_root" else config._default_text(name, declaration)
        assert f"| {flags} | {declaration.help} | {default} |" in README


def test_every_algorithm_has_its_page_and_its_row():
    for name in presets.ALGORITHMS:
        page = ROOT / "docs" / f"{'baselines' if name == 'pretrain' else name}.md"
        text = page.read_text()
        parts = ("Implementation details", "Results") + (
            ("Idea", "Flags", "Logged metrics") * (name != "pretrain")
        )
        assert all(f"## {part}" in text for part in parts), page
        assert f"--algorithm {name}" in text and f"| [`{name}`](docs/{page.name}) |" in README


@pytest.mark.parametrize(
    "page", [Path("README.md"), *sorted(p.relative_to(ROOT) for p in ROOT.glob("docs/*.md"))], ids=str
)
def test_the_commands_of_the_readme_and_of_the_pages_have_valid_flags(page):
    lines = re.findall(r"^python main\.py(.*)$", (ROOT / page).read_text(), re.MULTILINE)
    assert lines
    for line in lines:
        given = config.parse(shlex.split(line, comments=True))
        config.check_invocation(given)
        if "load" not in given:
            config.resolve(given)


def test_the_python_of_the_readme_runs():
    import dataset
    from learner import LEARNERS

    learner_code, dataset_code, library_code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    scope: dict = {"nn": torch.nn, "torch": torch, **vars(dataset)}
    exec(learner_code, scope)
    assert scope["wide"](3)(torch.zeros(2, 1)).shape == (2, 3) and "wide" not in LEARNERS
    exec(dataset_code, scope)
    batch = scope["Step"](5, 5).sample("train", 0, 0, range(100))
    assert ((batch.query_y == 0).any(1) & (batch.query_y != 0).any(1)).any()
    exec(library_code, scope)
    assert scope["step"].gradients.keys() == scope["parameters"].keys()
    assert scope["outputs"].shape == (25, 11, 10, 1)
