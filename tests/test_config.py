"""Flags: their defaults, how they combine, what a checkpoint keeps, and one clear line for each mistake."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT
from runs import settings_of

import learner
import main
from commands import parser
from commands.call import ALL_FLAGS
from commands.config import CONFIG_FLAGS
from commands.names import describe
from commands.resolve import resolve_from, restore_config
from commands.rules import ONLY
from common.errors import UsageError
from learners.options import LEARNERS

# ---- defaults ------------------------------------------------------------------------------------

DEFAULTS = {
    "": {"dataset": "sinusoid", "learner": "mlp", "shots": 10, "queries": 10, "steps": 1, "inner_lr": 0.001,
         "meta_batch_size": 25, "meta_lr": 1e-3, "iterations": 70_000, "eval_tasks": 600, "eval_steps": 10,
         "compile": "on", "engine": "unrolled", "convolution": "grouped", "tasks_at_once": None},
    "-s 5 --iterations 9999": {"compile": "off", "engine": "unrolled", "convolution": "grouped"},
    "--dataset omniglot": {"ways": 5, "shots": 1, "queries": 1, "steps": 1, "meta_batch_size": 32,
                           "inner_lr": 2.0, "iterations": 60_000, "test_steps": 3, "adapt_norm": False,
                           "compile": "on", "engine": "unrolled", "convolution": "im2col",
                           "tasks_at_once": 8},
    "--dataset omniglot -n 20 --compile auto": {"compile": "on", "engine": "adjoint", "tasks_at_once": 2},
    "--dataset omniglot -s 2 --engine unrolled --conv grouped": {
        "compile": "on", "engine": "unrolled", "convolution": "grouped", "tasks_at_once": None},
    "--dataset omniglot --tasks-at-once 4": {"compile": "on", "convolution": "im2col", "tasks_at_once": 4},
    "--dataset omniglot -n 20 -k 5": {"queries": 5, "steps": 5, "meta_batch_size": 16, "test_steps": 5},
    "--dataset omniglot --learner convnet": {"init": "torch", "adapt_norm": True, "inner_lr": 0.01},
    "--dataset mini-imagenet": {"learner": "conv4", "inner_lr": 0.05, "steps": 5, "meta_batch_size": 4},
    # a network of ReLUs cannot draw these tasks
    "--dataset harmonic": {"learner": "sines", "init": "torch", "steps": 5},
    "--dataset harmonic --learner mlp": {"learner": "mlp", "init": "paper", "steps": 1},
    "--samples 50": {"shots": 10, "queries": 40},
    "-k 5 -q 10 --samples 1000": {"shots": 5, "queries": 10},
    "--checkpoint_path x --first-order": {"meta_gradient": "first-order"},
    "--algorithm anil --first-order --inner-rates element": {
        "fast_weights": "head", "meta_gradient": "first-order", "inner_rates": "element", "inner_lr": 0.001},
    "--algorithm meta-sgd --inner-lr 0.2": {"inner_lr": 0.2, "inner_lr_max": None},
    "--algorithm meta-sgd --dataset omniglot -n 20": {"steps": 1, "test_steps": 1},
    "--algorithm reptile --inner-optimizer momentum": {"inner_momentum": 0.9},
    "--algorithm reptile --inner-optimizer adam": {"inner_momentum": 0.0},
    "--algorithm maml++ --iterations 3000": {"steps": 5, "objective": "multi-step", "exact_from": 0,
                                             "batch_norm": "transductive"},  # an mlp has no batch norm
    "--algorithm maml++ --dataset omniglot --iterations 3000": {"exact_from": 1500, "batch_norm": "per-step"},
    "--algorithm reptile --dataset omniglot": {
        "learner": "conv-flat", "inner_optimizer": "adam-carried", "inner_momentum": 0.0, "inner_batch": 10,
        "train_shots": 10, "test_steps": 50, "eval_steps": 50, "meta_lr_schedule": "linear"},
    "--algorithm cavia --dataset omniglot -n 20": {"fast_weights": "context", "steps": 5, "test_steps": 5},
    "--algorithm r2d2 --dataset omniglot": {
        "head_init": "ridge", "steps": 0, "eval_steps": 0, "test_steps": 0, "learner": "conv-pool",
        "meta_lr": 5e-3, "meta_lr_schedule": "halving", "ridge_lambda": 50.0, "ridge_scale": 5.0},
    "--algorithm r2d2 -s 2": {"steps": 2, "test_steps": 2, "eval_steps": 10, "meta_lr_schedule": "constant"},
    "--algorithm protonet --dataset omniglot --eval-steps 5": {"steps": 0, "eval_steps": 5, "test_steps": 0},
    "--dataset omniglot --head-init ridge -s 0": {"fast_weights": "all", "eval_steps": 0, "test_steps": 0},
}  # fmt: skip


@pytest.mark.parametrize("line", DEFAULTS)
def test_flags_override_the_preset_and_the_preset_the_datasets_defaults(line):
    settings = settings_of(line)
    assert {name: settings.get(name) for name in DEFAULTS[line]} == DEFAULTS[line]


@pytest.mark.parametrize("text", ["20000", "20_000", "20,000", "2e4", "2E+04", "20000.0"])
def test_a_whole_number_may_be_written_as_people_do(text):
    assert parser.parse(["--iterations", text])["iterations"] == 20_000


def test_every_condition_of_a_flag_is_a_rule():
    assert {flag.only for flag in ALL_FLAGS.values()} - {None} == ONLY.keys()


def test_settings_are_printed_with_their_words_whole_and_without_plain_defaults():
    for line in ("--algorithm fomaml", "--first-order"):
        printed = describe(settings_of(f"{line} --inner-rates layer-step --seed 7"))
        assert "first-order MAML (layer-step) on sinusoid 10-shot" in printed and "seed 7" in printed
        assert printed.endswith("inner rates layer-step") and len(printed.splitlines()) <= 3
    assert len(describe(settings_of("--dataset harmonic")).splitlines()) == 1


def test_reptile_counts_the_query_among_its_training_examples():
    assert settings_of("--algorithm reptile -k 5").training_shots == 5
    assert settings_of("--algorithm reptile --dataset omniglot").training_shots == 9
    assert settings_of("--train-shots 7").training_shots == 7


def test_facts_about_learners_match_the_learners():
    assert LEARNERS.keys() == learner.FACTORIES.keys()
    for name, facts in LEARNERS.items():
        kinds = {type(layer).__name__ for layer in learner.build_learner(name, 5).modules()}
        assert bool(kinds & {"BatchNorm1d", "BatchNorm2d"}) == (facts.adapt_norm is not None), name


# ---- mistakes ------------------------------------------------------------------------------------

MISTAKES = [
    ("-k 0", "-k: expected a whole number of at least 1, got '0'"),
    ("--dataset own.py", "expected the name of a function or class after a colon, as in file.py:factory"),
    ("--meta-lr nan", "--meta-lr: expected a number above 0, got 'nan'"),
    ("--dataset mnist", "--dataset: expected one of sinusoid, sinusoid-frequency, sinusoid-line,"),
    ("-k", "-k: expected one argument"),
    ("--dataset=--", "--dataset: expected an argument, got '--'"),
    ("--checkpoint-path a\x1b[31mb", r"expected text without control characters, in UTF-8, got 'a\x1b[31mb'"),
    # what is misspelt, or has no flag
    ("--no-such-flag", "there is no flag --no-such-flag (all flags: --help-all)"),
    ("--datset omniglot", "there is no flag --datset; did you mean --dataset?"),
    ("--metabatchsize=4", "there is no flag --metabatchsize; did you mean --meta-batch-size?"),
    ("--report-to wandbb", "there is no 'wandbb'; did you mean wandb?"),
    ("eval", "eval belongs to no flag; did you mean --eval?"),
    ("--shots 5", "there is no flag --shots; did you mean -k?"),
    ("--lr 0.1", "there is no flag --lr; did you mean --meta-lr?"),
    ("--sweep iner-lr=1,2", "iner-lr cannot be swept; did you mean --inner-lr?"),
    ("--load checkpoints/sinusoid-maml", "did you mean checkpoints/pretrained/sinusoid-maml?"),
    ("--load checkpoints/pretrained/sinusoid-mamll/best.pt", "mean checkpoints/pretrained/sinusoid-maml?"),
    ("--dataset=", "expected one of sinusoid, "),
    ("--dataset TMP", "expected images:"),
    ("--learner nowhere.py:net", "--learner nowhere.py:net: there is no file nowhere.py"),
    ("--algorithm mamll", "there is no 'mamll'; did you mean maml?"),
    ("--algorithm sgd-maml", "expected one of maml, fomaml, anil, boil, reptile, ..., got 'sgd-maml'"),
    ("omniglot -n 5", "omniglot: did you mean --dataset omniglot?"),
    ("checkpoints/x", "--load checkpoints/x to resume a run, or --eval --load checkpoints/x to measure it"),
    ("--eval runs/x.pt", "runs/x.pt belongs to no flag: type --eval --load runs/x.pt to measure it"),
    ("my.toml", "type --config my.toml to take settings from it"),
    ("--sweep k=1,000", "--sweep k=1,000: expected a whole number of at least 1, got '000'"),
    ("--iterations 10,00", "--iterations: expected a whole number, got '10,00'"),
    # ranges
    ("-k 10-1", "-k: expected a range LOW-HIGH, the first number below the second, got '10-1'"),
    ("-k 0-3", "-k: expected a whole number of at least 1, got '0-3'"),
    ("-k 1-3-5", "-k: expected a whole number, or a range LOW-HIGH, got '1-3-5'"),
    ("--dataset omniglot -n 1-5", "-n: expected a whole number of at least 2, got '1-5'"),
    ("-k 1-10 --samples 20", "--samples 20 leaves no one number of queries to -k 1-10: give -q"),
    ("--algorithm reptile --train-shots 20 -q 5-10", "20 of Reptile includes -q 5-10, which must be one num"),
    ("--algorithm reptile --train-shots 5-20 -q 5", "--train-shots 5-20 must be above -q 5, which Reptile"),
    # flags that have no meaning here
    ("-n 5", "-n has no meaning with --dataset sinusoid: leave it out"),
    ("--dataset omniglot --noise 0.1", "--noise has no meaning with --dataset omniglot"),
    ("--algorithm imaml --cg-steps 0 --cg-damping 1", "--cg-damping has no meaning with --cg-steps 0"),
    ("--dataset omniglot --norm-per-step --adapt-norm", "--adapt-norm has no meaning with --norm-per-step"),
    ("--algorithm reptile --first-order", "--first-order has no meaning with --algorithm reptile"),
    ("--algorithm r2d2 --inner-lr 0.1", "--inner-lr has no meaning with -s 0: leave it out"),
    ("--algorithm r2d2 --engine adjoint", "--engine has no meaning with -s 0: leave it out"),
    ("--meta-lr-schedule halving --meta-lr-final 0.1", "--meta-lr-final has no meaning with --meta-lr-sched"),
    ("--head-init zero --ridge-scale 2", "--ridge-scale has no meaning with --head-init zero: leave it out"),
    # settings that contradict each other
    ("--samples 10", "--samples 10 leaves no query: it must be above -k 10"),
    ("--samples 19 -q 10", "--samples 19 is less than -k 10 plus -q 10"),
    ("--dataset omniglot -q 1 --samples 1000", "--samples has no meaning with --dataset omniglot"),
    ("--learner conv", "--learner conv does not fit --dataset sinusoid: use mlp"),
    ("--loss cross-entropy", "--loss cross-entropy does not fit regression"),
    ("--inner-rates element --inner-lr-max 0.001", "--inner-lr-max 0.001 is not above --inner-lr 0.001"),
    ("--objective multi-step", "with one inner step (-s) the last is the only one"),
    ("-s 0", "-s 0 takes no inner step: it requires --head-init prototype or ridge"),
    ("--algorithm r2d2 --first-order", "--meta-gradient first-order: -s 0 takes no inner step"),
    ("--algorithm r2d2 --inner-rates layer-step", "--inner-rates layer-step: -s 0 takes no inner step"),
    ("--algorithm protonet --dataset omniglot --batch-norm per-step", "--batch-norm per-step: -s 0 takes no"),
    ("--algorithm protonet", "--head-init prototype: prototypes are of classes, and this is regression"),
    ("--head-init ridge --proximal 1", "--head-init ridge: each task has its own start"),
    ("--algorithm reptile --head-init ridge", "--head-init ridge: --meta-gradient reptile moves only what"),
    ("--algorithm imaml --inner-rates element", "does not depend on the rates"),
    ("--inner-optimizer adam-carried", "with --meta-gradient reptile alone"),
    ("--test-steps 11 --eval-steps 10", "--test-steps 11 is above --eval-steps 10"),
    # what to do, and where
    ("--eval --resume --run-name x", "--eval and --resume do not go together"),
    ("--resume", "--resume needs --run-name"),
    ("--run-name a/b", "--run-name: expected a name for a folder, got 'a/b'"),
    # what the machine and the disk say
    ("--load no-such-file.pt", "no-such-file.pt: there is no such checkpoint"),
    ("--checkpoint-path /dev/null/x", "/dev/null/x"),
    ("--fast-weights head --head 7 --checkpoint-path TMP", "the learner has no part '7'"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message"), MISTAKES, ids=[line[:60] for line, _ in MISTAKES])
def test_a_mistake_is_one_line_and_exit_code_2(line, message, tmp_path, refuse):
    assert message in refuse(*(tmp_path if word == "TMP" else word for word in line.split(" ")))


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 2, "lower --tasks-at-once"),
        (OSError(28, "No space left on device", "x.pt"), 2, "x.pt: no space left on device; free some space"),
        (RuntimeError("f does not have a deterministic implementation, but"), 2, "leave --deterministic out"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_an_error_while_running_is_one_line_with_its_exit_code(error, code, message, capsys, monkeypatch):
    def fail(*_: object) -> int:
        raise error

    monkeypatch.setattr(main, "dispatch", fail)
    assert main.main([]) == code
    assert message in capsys.readouterr().err


def test_a_mistake_in_this_tool_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(main, "dispatch", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main.main([])


# ---- help ----------------------------------------------------------------------------------------


def test_help_shows_the_usual_flags_and_help_all_every_one(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    usual, everything = (parser.build_parser(every_flag=every).format_help() for every in (False, True))
    for flag in ALL_FLAGS.values():
        assert f"\n  {flag.name}" in everything
        assert (f"\n  {flag.name}" in usual) == flag.common
        assert " ".join(flag.help.split())[:40] in " ".join(everything.split())
    assert 28 <= sum(flag.common for flag in ALL_FLAGS.values()) <= 34 and len(ALL_FLAGS) <= 112
    words = "-k -q -n -s --samples --dataset --meta-batch-size --iterations --eval --load --checkpoint_path"
    assert {*words.split()} <= {name for flag in ALL_FLAGS.values() for name in flag.names}
    assert max(map(len, (usual + everything).splitlines())) <= 100
    for command in ("--dataset omniglot -n 5 -k 1", "--eval --load", "--adapt", "--compare"):
        assert f"python main.py {command}" in usual


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("--meta-b", "--meta-batch-size"), ("--dataset omni", "omniglot"), ("--omniglot-split al", "alphabet")],
)
def test_a_shell_completes_flags_and_names_before_pytorch_is_imported(typed, offered, tmp_path):
    pytest.importorskip("argcomplete")
    shell = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "out")}
    shell |= {"COMP_LINE": f"main.py {typed}", "COMP_POINT": str(len(f"main.py {typed}"))}
    code = "import sys, main; sys.modules['torch'] = None; main.main([])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | shell).returncode == 0
    assert (tmp_path / "out").read_text().strip() == offered


def test_a_closed_pipe_ends_without_a_traceback():
    line = [sys.executable, "main.py", "--help-all"]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""


# ---- checkpoints ---------------------------------------------------------------------------------


def test_settings_survive_a_checkpoint_and_missing_ones_take_their_default():
    plain = settings_of("--algorithm imaml").values()
    for lost in (None, *plain):
        saved = {name: value for name, value in plain.items() if name != lost}
        expected = plain | ({"algorithm": "maml"} if lost == "algorithm" else {})
        assert restore_config(saved, None).values() == expected, lost


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shots": 0}, "its setting shots should be a whole number of at least 1"),
        ({"extra": 1}, "a newer version may know them"),
        ({"learner": "conv"}, "--learner conv does not fit"),
    ],
)
def test_a_checkpoints_settings_are_checked(change, message):
    with pytest.raises(UsageError, match=message):
        restore_config(settings_of("").values() | change, None)


def test_flags_override_a_checkpoints_settings_only_where_they_may():
    saved = settings_of("--dataset omniglot")
    assert resolve_from(saved, {"iterations": 70_000}, evaluate=False).training.iterations == 70_000
    test = resolve_from(saved, {"shots": 5, "queries": 15, "eval_tasks": 10}, evaluate=True)
    assert (test.tasks.shots, test.tasks.queries, test.evaluation.eval_tasks) == (5, 15, 10)
    fixed = {"dataset": "sinusoid", "ways": 3}, {"shots": 5, "precision": "float64", "metric": "mae"}
    for evaluate, flags in zip((True, False), fixed, strict=True):
        for name, value in flags.items():
            message = f"{CONFIG_FLAGS[name].name} .* disagrees with the checkpoint"
            with pytest.raises(UsageError, match=message):
                resolve_from(saved, {name: value}, evaluate=evaluate)


def test_samples_are_compared_with_the_checkpoints_query():
    saved = settings_of("--samples 50")
    assert resolve_from(saved, {"samples": 50}, evaluate=False) == saved
    with pytest.raises(UsageError, match="-q 20 disagrees"):
        resolve_from(saved, {"samples": 30}, evaluate=False)
    assert resolve_from(saved, {"samples": 30, "shots": 5}, evaluate=True).tasks.queries == 25


def test_code_that_a_checkpoint_names_may_have_moved():
    moved = resolve_from(settings_of("--learner own.py:net"), {"learner": "other/own.py:net"}, evaluate=True)
    assert moved.learner.learner == "other/own.py:net"
