"""The README is true: its commands are those that CI runs, its flags those that exist, its Python runs."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from commands import config, members, presets

README = (ROOT / "README.md").read_text()
PAGES = [Path("README.md"), *sorted(page.relative_to(ROOT) for page in ROOT.glob("docs/*.md"))]


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


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_the_commands_of_the_readme_and_of_the_pages_have_valid_flags(page):
    launched = r"^(?:python|torchrun .*?) main\.py(.*)$"
    lines = re.findall(launched, (ROOT / page).read_text(), re.MULTILINE)
    assert lines
    for line in lines:
        given = config.parse(shlex.split(line, comments=True))
        members.members_of(config.check_invocation(given), given)
        if not {"load", "compare"} & given.keys():
            config.resolve(given)


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_the_links_between_the_pages_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?://)(.*?)\)", (ROOT / page).read_text()):
        file, _, anchor = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    """As it stands there: learner and dataset as files of the user's, named by the flags beside."""
    import main

    learner_code, dataset_code, library_code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    for code in (learner_code, dataset_code):
        (tmp_path / code.split()[1]).write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.trainer.VALIDATION_TASKS", 4)
    for file in ("wide.py:wide", "steps.py:Steps"):
        (line,) = re.findall(rf"^python main\.py(.*{file}.*)$", README, re.MULTILINE)
        run = ["--iterations", "2", "--meta-batch-size", "3", "--run-name", file.partition(".")[0]]
        assert main.main([*shlex.split(line), *run]) == 0
    scope: dict = {}
    exec(library_code, scope)
    assert scope["step"].gradients.keys() == scope["parameters"].keys()
    assert scope["outputs"].shape == (25, 11, 10, 1)
    losses = [
        torch.nn.functional.mse_loss(scope["maml"].forward(weights, scope["x"]), scope["y"])
        for weights in (scope["parameters"], scope["adapted"])
    ]
    assert losses[1] < losses[0]
    assert torch.equal(scope["network"](scope["x"]), scope["maml"].forward(scope["adapted"], scope["x"]))
