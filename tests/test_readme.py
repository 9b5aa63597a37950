"""The README is true: its commands are those that CI runs, its flags those that exist, its Python runs."""

import re
import shlex

import torch
from conftest import ROOT

import config

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


def test_the_commands_of_the_readme_have_valid_flags():
    lines = re.findall(r"^python main\.py(.*)$", README, re.MULTILINE)
    assert len(lines) > 10
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
