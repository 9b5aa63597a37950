"""The pages are true: every flag exists, commands parse, links lead somewhere, the README's Python runs."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from runs import command
from torch.distributed.run import get_args_parser

from commands.call import check_call
from commands.members import list_members
from commands.parser import build_parser, parse
from commands.presets import PRESETS
from commands.resolve import resolve

README = (ROOT / "README.md").read_text()
FOLDERS = (".", "docs", "examples", "benchmarks", "checkpoints/pretrained")
PAGES = [page.relative_to(ROOT) for folder in FOLDERS for page in sorted((ROOT / folder).glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def command_lines(page: Path, launched: str) -> list[str]:
    """Return what follows `launched` in each line of a page's shell blocks; a backslash continues a line."""
    text = "\n".join(blocks(page, "sh") + blocks(page, "")).replace("\\\n", " ")
    return re.findall(rf"^{launched}(.*)$", text, re.MULTILINE)


def test_ci_runs_the_readmes_test_command():
    lines = re.findall(r"^python3 -m venv .*-m pytest.*$", README, re.MULTILINE)
    assert lines and lines[0] in (ROOT / ".ci/run").read_text().splitlines()


@pytest.mark.parametrize("name", PRESETS)
def test_every_algorithm_has_its_page_and_its_row(name):
    page = ROOT / "docs" / f"{'baselines' if name == 'pretrain' else name}.md"
    assert f"--algorithm {name}" in page.read_text() and f"| [`{name}`](docs/{page.name}) |" in README


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_the_commands_of_a_page_have_valid_flags(page, monkeypatch):
    monkeypatch.setattr("commands.parser.read_settings", lambda _, flags: flags)  # there is no such file
    for line in command_lines(page, r"(?:python|torchrun .*?) main\.py"):
        flags = parse(shlex.split(line, comments=True))
        call = check_call(flags)
        if not {"load", "compare"} & flags.keys():
            list_members(call, flags)
            resolve(flags)
    for line in command_lines(page, "python (?=[a-z]+/)"):
        assert (ROOT / line.split()[0]).is_file(), line


@pytest.fixture(scope="module")
def flags() -> set[str]:
    """Return the flags of the tool, of torchrun, of the scripts that pages call, and one of TensorBoard."""
    files = [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("examples/*.py")]
    scripts = {name for file in files for name in re.findall(r'"(--[a-z][a-z-]*)"', file.read_text())}
    parsers = (build_parser(), get_args_parser())
    return scripts.union(*(parser._option_string_actions for parser in parsers), {"--logdir"})


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_flag_on_a_page_exists(page, flags):
    text = (ROOT / page).read_text()
    fenced = re.findall(r"^```(?:sh)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    inline = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", "\n".join(fenced + inline)))
    assert sorted(mentioned - flags) == []


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_the_links_of_a_page_have_targets(page):
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\((?!https?://)(.*?)\)", text) + re.findall(r'(?:src|srcset)="(.*?)"', text):
        file, _, anchor = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readmes_python_runs(tmp_path, monkeypatch):
    """Write each block that starts with a file's name to that file, and run its commands; run the others."""
    monkeypatch.chdir(tmp_path)
    snippets = blocks(Path("README.md"), "python")
    files = {code.split()[1]: code for code in snippets if re.match(r"# \w+\.py\n", code)}
    for file, code in files.items():
        Path(file).write_text(code)
        for line in command_lines(Path("README.md"), rf"python main\.py(?=.*\b{file}:)"):
            run = ["--iterations", "2", "--meta-batch-size", "3", "--run-name", file]
            assert command(*shlex.split(line, comments=True), *run) == 0
    for code in snippets:
        if code not in files.values():
            scope: dict = {}
            exec(code, scope)
    maml, batch = scope["maml"], scope["batch"]
    x, y = batch.support_x[0], batch.support_y[0]
    before, after = (maml.call(weights, x) for weights in (scope["parameters"], scope["adapted"].weights))
    assert torch.nn.functional.mse_loss(after, y) < torch.nn.functional.mse_loss(before, y)
    assert torch.equal(scope["network"](x), after)
    assert scope["outputs"].shape == (25, 11, 10, 1)
