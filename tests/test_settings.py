"""Settings as a file: what a run writes repeats it, flags win over it, and a mistake names its line."""

import tomllib

import pytest
from runs import assert_same_run, command, settings_of, train

from commands import presets
from commands.call import check_call
from commands.members import list_members
from commands.parser import parse
from commands.settings import render_settings
from training.folders import LAST, SETTINGS

LINES = (
    "",
    "--samples 30 --seed 7 --threads 2",
    "--dataset omniglot -n 20 -k 5 --no-invert --compile auto --meta-lr 1e-5",
    "--algorithm maml++ --dataset omniglot --iterations 3000 --first-order",
    "--algorithm reptile --dataset mini-imagenet --augment flip,crop",
    "--dataset table:x.csv --columns task=t target=a,b --exclude-columns c -k 2",
)
SHORT = ["--iterations", 30, "--log-every", 10, "--val-every", 15, "--save-every", 20, "--meta-batch-size", 4]


@pytest.fixture
def write(tmp_path):
    """Write a settings file from a command line, or with a text; return the flag that names it."""

    def write_file(text: str, *, line: bool = True) -> str:
        (tmp_path / "my.toml").write_text(
            render_settings("main.py", parse(text.split()), settings_of(text)) if line else text
        )
        return f"--config {tmp_path / 'my.toml'}"

    return write_file


# ---- from a run to a file, and back --------------------------------------------------------------


@pytest.mark.parametrize("line", LINES)
def test_a_file_repeats_its_settings_whatever_the_defaults_are_by_now(line, write, monkeypatch):
    expected, again = settings_of(line), write(line)
    assert settings_of(again) == expected
    monkeypatch.setitem(presets.DEFAULTS, "save_every", (7, 7, 7, 7))
    monkeypatch.setitem(presets.PRESETS["maml++"], "steps", 9)
    assert settings_of(line) != expected
    assert settings_of(again) == expected


def test_a_repeated_run_ends_with_the_same_bits(tmp_path):
    one = train(tmp_path / "one", *SHORT, "--algorithm", "anil", "-s", 2, "--seed", 3)
    two = train(tmp_path / "two", "--config", one / SETTINGS)
    assert_same_run(one, two)
    one, two = (tomllib.loads((run / SETTINGS).read_text()) for run in (one, two))
    assert one["given"] == two["given"] and one["resolved"] == two["resolved"]


def test_the_file_of_a_resumed_run_says_what_all_its_commands_gave(tmp_path):
    run = train(tmp_path / "run", *SHORT, "--meta-lr", 0.01)
    for iterations in (40, 50, 50):
        assert command("--load", run / LAST, "--iterations", iterations) == 0
    settings = tomllib.loads((run / SETTINGS).read_text())
    assert [line.partition(" --")[2][:4] for line in settings["commands"]] == ["iter", "load", "load"]
    assert settings["given"]["iterations"] == 50 and settings["given"]["meta-lr"] == 0.01
    assert "load" not in settings["given"] and "run-name" not in settings["given"]


def test_a_run_of_a_sweep_is_repeated_by_itself(tmp_path):
    line = ["--iterations", 2, "--seeds", "1-2", "--sweep", "s=1,2", "--runs-at-once", 1]
    folder = train(tmp_path / "grid", *SHORT, *line)
    flags = parse(["--config", str(folder / "s-2_seed-1" / SETTINGS)])
    assert check_call(flags).seeds is None and (flags["steps"], flags["seed"]) == (2, 1)


def test_the_settings_of_a_command_are_printed_as_such_a_file(tmp_path, capsys):
    line = "--dataset omniglot --algorithm maml++"
    assert command(*line.split(), "--print-config") == 0
    (tmp_path / "printed.toml").write_text(capsys.readouterr().out)
    assert settings_of(f"--config {tmp_path / 'printed.toml'}") == settings_of(line)


# ---- flags win -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "flags", "alone"),
    [
        ("--dataset omniglot --seed 3", "--seed 4", "--dataset omniglot --seed 4"),
        ("--seed 3", "--algorithm anil", "--seed 3 --algorithm anil"),
        # with its inner steps and its meta-batch
        ("--dataset omniglot", "-n 20", "--dataset omniglot -n 20"),
        ("--algorithm reptile", "--algorithm maml", ""),
        ("--samples 30", "-q 5", "-q 5"),
        ("-q 5", "--samples 30", "--samples 30"),
        ("--meta-gradient implicit --proximal 1", "--first-order", "--first-order --proximal 1"),
    ],
)
def test_flags_win_over_the_file_and_keep_their_whole_meaning(file, flags, alone, write):
    assert settings_of(f"{write(file)} {flags}") == settings_of(alone)


def test_seeds_and_sweeps_win_over_the_file(write):
    flags = parse(f"{write('--seed 3 --inner-lr 0.5 -s 2')} --seeds 0-1 --sweep inner-lr=0.1,0.2".split())
    _, configs = list_members(check_call(flags), flags)
    assert {(c.training.seed, c.choices.inner_lr, c.choices.steps) for c in configs.values()} == {
        (seed, rate, 2) for seed in (0, 1) for rate in (0.1, 0.2)
    }


def test_a_file_by_hand_may_name_settings_in_each_form(write):
    text = '\ufeffdataset = "omniglot"\nmeta_batch_size = 8\n[given]\nn = 20\ninvert = false\n"-k" = 5\n'
    expected = settings_of("--dataset omniglot --meta-batch-size 8 -n 20 --no-invert -k 5")
    assert settings_of(write(text, line=False)) == expected


def test_several_data_sets_and_trackers_are_lists_in_a_file(write):
    text = "dataset = ['omniglot', 'icons']\nreport-to = ['wandb', 'trackio']"
    flags = parse(["--dataset", "omniglot", "icons", "--report-to", "wandb", "trackio"])
    assert flags == {"dataset": "omniglot + icons", "report_to": "wandb,trackio"}
    assert parse(write(text, line=False).split()).items() >= flags.items()


# ---- mistakes ------------------------------------------------------------------------------------

MISTAKES = [
    ("# a\nk = 0", "PATH, line 2: -k: expected a whole number of at least 1, got '0'"),
    ("first-order = 3", "line 1: --first-order: expected yes or no, got '3'"),
    ("[given]\n\nmeta-lr = nan", "line 3: --meta-lr: expected a number above 0, got 'nan'"),
    ("depth = 3", "PATH, line 1: depth is no setting"),
    ("[tasks]\nk = 3", "PATH: tasks is no setting"),
    ("eval = true", "line 1: eval says what to do and is no setting: type --eval"),
    ("sweep = ['learner=own.py:net,mlp']", "line 1: sweep says what to do and is no setting"),
    ("k = 5\n[given]\nshots = 6", "PATH: -k is set twice: leave one out"),
    ("k = 3 4", "PATH is no TOML file: Expected newline or end of document after a statement (at line 1"),
    # what contradicts only something else
    ("k = 10\n\nsamples = 5", "--samples 5 leaves no query: it must be above -k 10 (PATH, line 1, line 3)"),
    ("\nlearner = 'conv'", "does not fit --dataset sinusoid: use mlp or sines or "),
    # the user's code
    ("learner = 'a.py:f'", "PATH names code that is not this tool's: if you trust it, add --learner a.py:f"),
    ("[resolved]\nloss = 'own.py:loss'", "if you trust it, add --loss own.py:loss"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), MISTAKES, ids=[text[:30] for text, _ in MISTAKES])
def test_a_mistake_in_a_file_is_the_flags_own_with_its_line(text, message, write, refuse):
    flag, path = write(text, line=False).split()
    assert message.replace("PATH", path) in refuse(flag, path)


def test_code_that_a_file_names_is_taken_once_a_flag_names_it(write):
    again = write("--learner own.py:net -k 3")
    assert settings_of(f"{again} --learner own.py:net") == settings_of("--learner own.py:net -k 3")


def test_a_missing_file_and_a_clash_are_one_line(tmp_path, refuse):
    assert "none.toml: no such file" in refuse("--config", tmp_path / "none.toml")
    assert f"{tmp_path}: is a directory" in refuse("--config", tmp_path)
    assert "--print-config and --eval do not go together" in refuse("--print-config", "--eval")
