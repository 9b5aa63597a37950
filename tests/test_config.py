"""Flags: their defaults, how they combine, and one clear line for each mistake."""

import subprocess
import sys

import pytest
from conftest import ROOT

import learner
import main
from commands import config
from common.errors import UsageError


def resolve(*arguments: str) -> config.Config:
    return config.resolve(config.parse(list(arguments)))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], dict(dataset="sinusoid", learner="mlp", shots=10, queries=10, steps=1, meta_batch_size=25,
                  inner_lr=0.01, meta_lr=1e-3, iterations=70_000, eval_tasks=600, eval_steps=10)),
        (["--dataset", "omniglot"], dict(ways=5, shots=1, queries=1, steps=1, meta_batch_size=32,
                                         inner_lr=2.0, iterations=60_000, test_steps=3, adapt_norm=False)),
        (["--dataset", "omniglot", "-n", "20", "-k", "5"], dict(ways=20, queries=5, steps=5,
                                                               meta_batch_size=16, test_steps=5)),
        (["--dataset", "omniglot", "--learner", "convnet"], dict(init="torch", adapt_norm=True,
                                                                 inner_lr=0.01)),
        (["-s", "20"], dict(steps=20, test_steps=20, eval_steps=20)),
        (["--samples", "50"], dict(shots=10, queries=40)),
        (["--samples", "25", "-k", "5", "-q", "20"], dict(shots=5, queries=20)),
        (["--algorithm", "anil", "--first-order", "--inner-rates", "element"],
         dict(fast_weights="head", meta_gradient="first-order", inner_rates="element", inner_lr=0.01)),
        (["--algorithm", "maml++", "--iterations", "3000"],
         dict(steps=5, objective="multi-step", exact_from=0, grad_clip_norm=1.0, batch_norm="transductive")),
        (["--algorithm", "maml++", "--dataset", "omniglot", "--iterations", "3000"], dict(exact_from=1500)),
        (["--algorithm", "maml++", "--dataset", "omniglot", "-n", "20", "--first-order"],
         dict(learner="conv-pool", batch_norm="per-step", exact_from=0, meta_batch_size=8, inner_lr=0.1)),
        (["--algorithm", "reptile", "--dataset", "omniglot"],
         dict(learner="conv-flat", init="torch", inner_optimizer="adam", inner_beta_1=0.0, inner_lr=1e-3,
              steps=5, inner_batch=10, inner_carry=True,
              training_shots=9, test_steps=50, eval_steps=50, meta_lr_schedule="linear")),
        (["--algorithm", "reptile", "--dataset", "omniglot", "--meta-optimizer", "adam"],
         dict(inner_carry=False)),
        (["--algorithm", "reptile", "--dataset", "omniglot", "--head-init", "zero"], dict(inner_carry=False)),
        (["--algorithm", "reptile"], dict(inner_carry=False)),
        (["--algorithm", "reptile", "--dataset", "mini-imagenet"],
         dict(inner_lr=1e-3, steps=8, inner_batch=10, train_shots=16, test_steps=50, meta_batch_size=5)),
        (["--algorithm", "maml++", "--dataset", "mini-imagenet"],
         dict(learner="conv4", inner_lr=0.01, meta_batch_size=2, steps=5, msl_iterations=7500)),
        (["--dataset", "mini-imagenet"],
         dict(learner="conv4", inner_lr=0.05, steps=5, test_steps=10, meta_batch_size=4)),
        (["--algorithm", "cavia", "--dataset", "mini-imagenet"], dict(inner_lr=1.0, steps=2, test_steps=2)),
        (["--algorithm", "cavia", "--dataset", "omniglot", "-n", "20"], dict(steps=5, test_steps=5)),
        (["--dataset", "omniglot", "--head-init", "prototype", "--head", "13"], dict(head="13")),
        (["--algorithm", "reptile", "-k", "5"], dict(training_shots=5, queries=10, train_shots=None)),
        (["--algorithm", "meta-sgd"], dict(inner_lr=0.005, inner_lr_max=0.1)),
        (["--algorithm", "meta-sgd", "--inner-lr", "0.2"], dict(inner_lr=0.2, inner_lr_max=None)),
        (["--algorithm", "pretrain"], dict(trained_steps=0)),
        (["--train-shots", "7"], dict(shots=10, training_shots=7)),
        (["--checkpoint_path", "x", "--no-first-order"], dict(meta_gradient="exact")),
    ],
)  # fmt: skip
def test_defaults_come_from_the_table_and_flags_override_them(arguments, expected):
    resolved = resolve(*arguments)
    assert {name: getattr(resolved, name) for name in expected} == expected


MISTAKES = [
    ("-k 0", "-k: expected a whole number of at least 1, got '0'"),
    ("-q 0", "-q: expected"),
    ("-k 1000000000000", "-k: expected a whole number below 2^31"),
    ("-s 1.5", "-s: expected a whole number, got '1.5'"),
    ("--dataset omniglot -n 1", "-n: expected a whole number of at least 2"),
    ("--meta-batch-size 0", "--meta-batch-size: expected"),
    ("--iterations -5", "--iterations: expected"),
    ("--inner-lr 0", "--inner-lr: expected a number above 0, got '0'"),
    ("--meta-lr nan", "--meta-lr: expected a number above 0, got 'nan'"),
    ("--grad-clip inf", "--grad-clip: expected"),
    ("--noise -1", "--noise: expected a number that is not negative"),
    ("--seed -1", "--seed: expected a whole number from 0"),
    ("--dataset mnist", "--dataset: expected one of sinusoid, sinusoid-frequency, sinusoid-line,"),
    ("--device tpu", "--device: expected one of auto, cpu, cuda, mps, got 'tpu'"),
    ("--precision tf32 --device cpu", "--precision tf32 is for CUDA GPUs"),
    ("--conv im2col", "--conv means nothing with --learner mlp"),
    ("--algorithm mml", "--algorithm: expected one of maml, fomaml, anil, boil, reptile, meta-sgd, maml++"),
    ("--first-order --meta-gradient exact", "--first-order disagrees with --meta-gradient exact"),
    ("--head 0", "--head means nothing with --fast-weights all"),
    ("--context-size 3", "--context-size means nothing with --fast-weights all"),
    ("--algorithm meta-sgd --inner-rates fixed --inner-lr-max 1", "nothing with --inner-rates fixed"),
    ("--inner-rates element --inner-lr-max 0.001", "--inner-lr-max 0.001 is not above --inner-lr 0.01"),
    ("--algorithm fomaml --exact-from 5", "--exact-from means nothing with --meta-gradient first-order"),
    ("--cg-steps 3", "--cg-steps means nothing with --meta-gradient exact"),
    ("--algorithm imaml --engine adjoint", "--engine means nothing with --meta-gradient implicit"),
    ("--msl-iterations 3", "--msl-iterations means nothing with --objective last"),
    ("--inner-momentum 0.5", "--inner-momentum means nothing with --inner-optimizer sgd"),
    ("--inner-carry", "--inner-carry means nothing with --inner-optimizer sgd"),
    ("--algorithm reptile --dataset omniglot --head-init zero --inner-carry",
     "--inner-carry means nothing with --head-init zero"),
    ("--inner-carry --inner-optimizer adam", "--inner-carry means nothing with --meta-gradient exact"),
    ("--inner-optimizer adam --inner-beta1 1", "--inner-beta1: expected a number from 0 to below 1"),
    ("--meta-lr-final 0.1", "--meta-lr-final means nothing with --meta-lr-schedule constant"),
    ("--algorithm reptile --no-first-order", "--first-order means nothing with --algorithm reptile"),
    ("--objective multi-step", "with one inner step (-s) the last is the only one"),
    ("--algorithm imaml --cg-steps 0 --cg-damping 5", "--cg-damping means nothing with --cg-steps 0"),
    ("--algorithm imaml --autotune", "--autotune: --meta-gradient implicit with --learner mlp leaves"),
    ("--dataset omniglot --norm-per-step --adapt-norm", "--adapt-norm means nothing with --norm-per-step"),
    ("--norm-per-step", "--norm-per-step means nothing with --learner mlp"),
    ("--algorithm reptile --dataset omniglot --train-shots 25", "--train-shots 25 is 25, but an Omniglot"),
    ("--algorithm imaml --inner-rates element", "does not depend on the rates"),
    ("--algorithm imaml --objective multi-step", "looks at the end of the inner loop alone"),
    ("--algorithm imaml --proximal 0", "needs a --proximal above 0"),
    ("--algorithm imaml --inner-batch 3", "needs the same support loss in every step"),
    ("--algorithm reptile --inner-rates layer-step", "gives the rates no gradient"),
    ("--algorithm reptile --objective multi-step", "has no query loss"),
    ("--algorithm reptile --fast-weights head", "moves only what the inner loop adapts"),
    ("--algorithm reptile --train-shots 10", "--train-shots 10 must be above -q 10"),
    ("--algorithm reptile --dataset omniglot --no-adapt-norm", "the shift would never learn"),
    ("--algorithm reptile --dataset omniglot --batch-norm per-step", "moves only what the inner loop"),
    ("--algorithm pretrain --inner-rates element", "has no inner loop that rates could learn from"),
    ("--algorithm pretrain --fast-weights context", "has no inner loop"),
    ("--dataset omniglot --fast-weights head --adapt-norm", "--adapt-norm means nothing with --fast-weights"),
    ("--dataset omniglot --oracle", "--oracle means nothing with omniglot"),
    ("--dataset omniglot --train-shots 20", "--train-shots 20 plus -q 1 is 21"),
    ("--fast-weights head --head 7 --checkpoint-path TMP", "no part '7': there are 0, 2, 4"),
    ("--fast-weights body --head 0,2,4 --checkpoint-path TMP", "has nothing to adapt"),
    ("--engine fast", "--engine: expected one of auto, unrolled, adjoint"),
    ("--autotune --eval", "--autotune chooses when a run begins"),
    ("--no-such-flag", "unrecognized arguments: --no-such-flag"),
    ("--iter 5", "unrecognized arguments: --iter 5"),
    ("-k", "-k: expected one argument"),
    ("--samples 10", "--samples 10 leaves no query: it must be above -k 10"),
    ("--samples 30 -q 10", "--samples 30 is not -k 10 plus -q 10"),
    ("--dataset omniglot --samples 10", "use -k and -q in classification"),
    ("--dataset omniglot -k 15 -q 6", "-k 15 plus -q 6 is 21, but an Omniglot character has 20 drawings"),
    ("--dataset omniglot -k 11", "-k 11 plus -q 11 is 22"),
    ("--dataset omniglot -n 101", "-n 101 is more than the 100 characters of the validation split"),
    ("--dataset omniglot --omniglot-split alphabet -n 159", "the 158 characters of the validation split"),
    ("-n 5", "-n means nothing with regression (sinusoid)"),
    ("--dataset omniglot --noise 0.1", "--noise means nothing with omniglot"),
    ("--resize nearest", "--resize means nothing with sinusoid"),
    ("--batch-norm inductive", "--batch-norm means nothing with --learner mlp"),
    ("--learner conv", "--learner conv does not fit --dataset sinusoid: use mlp"),
    ("--dataset omniglot --learner mlp", "use conv or conv-flat or conv-pool or conv4 or convnet or fc"),
    ("--dataset omniglot --learner convnet --init paper", "not a network of the paper"),
    ("--test-steps 11 --eval-steps 10", "--test-steps 11 is above --eval-steps 10"),
    ("--eval --resume --run-name x", "leave out --eval"),
    ("--resume", "--resume needs the --run-name"),
    ("--load a --init-from b", "give one"),
    ("--init-from a --init torch", "--init-from gives the initial weights"),
    ("--eval --load a --checkpoint-path b", "results go beside the file of --load"),
    ("--load a --run-name b", "--load takes the folder of the checkpoint"),
    ("--out x", "--out is where --eval, --adapt and --compare write"),
    ("--run-name a/b", "is no name for a folder"),
    ("--run-name ..", "is no name for a folder"),
    (f"--run-name {300 * 'a'}", "is no name for a folder"),
    (f"--load {300 * 'a'}", "file name too long"),
    ("--load no-such-file.pt", "no-such-file.pt: there is no such checkpoint"),
    ("--eval --load no-such-file.pt", "no-such-file.pt: there is no such checkpoint"),
    ("--init-from no-such-file.pt --checkpoint-path TMP", "there is no such checkpoint"),
    ("--checkpoint-path /dev/null/x", "--checkpoint-path /dev/null/x: cannot write there"),
    ("--eval --out /dev/null/x", "--out /dev/null/x: cannot write there"),
    ("--dataset=--", "--dataset: expected an argument, got '--'"),
    ("--checkpoint-path a\x1b[31mb", r"expected text without control characters, in UTF-8, got 'a\x1b[31mb'"),
    ("--run-name caf\udce9", "expected text without control characters, in UTF-8"),
    ("--nonsense=\x1b[31m", r"unrecognized arguments: --nonsense=\x1b[31m"),
    (f"--load {1000 * 'a'} --adapt b --eval", "--adapt and --eval are two things"),
    ("--split-shares ²,1,1", "three whole numbers below 10^9"),
    ("--split-shares 99999999999999999,1,1", "three whole numbers below 10^9"),
    ("--seeds 0-999999999999", "is no range of up to 1,000 seeds"),
    (f"--seeds {5000 * '9'}", "is no range of up to 1,000 seeds below 2^63"),
    (f"--seeds {5000 * '0-999,'}1", "more than 1,000 runs"),
    (f"--sweep task-column={60 * 'a'} target-columns={60 * 'b'} input-columns={60 * 'c'} head={60 * 'd'} "
     f"learner=x.py:{60 * 'e'}", "--sweep of 5 flags makes names too long"),
    ("--iterations 2000000000", "points: --log-every 20000 and --val-every 20000 will do"),
    ("--iterations 200000 --log-every 1", "points: --log-every 2 will do"),
    ("-s 2000000000", "-s: expected a whole number up to 100,000"),
    ("--threads 2000000000", "--threads: expected a whole number up to 1,024"),
    ("--meta-batch-size 2000000000 --checkpoint-path TMP", "memory: lower -k or -q or --meta-batch-size"),
    ("-k 2000000000 --checkpoint-path TMP", "25 tasks of 2,000,000,010 examples take"),
    ("--dataset images:x --image-size 100000 --checkpoint-path TMP", "or --meta-batch-size or --image-size"),
    ("--eval --eval-tasks 2000000000", "GiB of memory: lower --eval-tasks or --eval-steps"),
    ("--deterministic --autotune", "leave it out with --deterministic"),
    ("--learner-args width=0 --checkpoint-path TMP", "nothing is left for its last layers"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", ("on", "unrolled", "grouped", None)),
        ("-s 5 --iterations 9999", ("off", "unrolled", "grouped", None)),
        ("--dataset omniglot", ("on", "unrolled", "im2col", 8)),
        ("--dataset omniglot --iterations 1499", ("off", "unrolled", "grouped", None)),
        ("--dataset omniglot -n 20 --compile auto", ("on", "adjoint", "im2col", 2)),
        ("--dataset omniglot -s 2 --engine unrolled --conv grouped", ("on", "unrolled", "grouped", None)),
        ("--dataset omniglot --tasks-at-once 4", ("on", "unrolled", "im2col", 4)),
        ("--dataset omniglot --meta-batch-size 12", ("on", "unrolled", "im2col", 6)),
        ("--dataset omniglot --meta-batch-size 31", ("on", "unrolled", "im2col", 8)),
        ("--dataset omniglot --compile off", ("off", "unrolled", "grouped", None)),
    ],
)
def test_how_to_compute_is_settled_by_the_settings_alone(line, expected):
    settled = config.resolve(config.parse(line.split()))
    assert (settled.compile, settled.engine, settled.convolution, settled.tasks_at_once) == expected


@pytest.mark.parametrize(("line", "message"), MISTAKES, ids=[line[:60] for line, _ in MISTAKES])
def test_a_mistake_gets_one_line_and_exit_code_2(line, message, capsys, tmp_path):
    assert main.main([str(tmp_path) if word == "TMP" else word for word in line.split()]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("main.py: error: ")
    assert message in said


def test_a_device_that_is_not_there_is_refused(capsys, tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main.main(["--device", "cuda", "--checkpoint-path", str(tmp_path)]) == 2
    assert "PyTorch finds no CUDA GPU here; use --device cpu" in capsys.readouterr().err


def test_out_of_memory_says_what_to_do(capsys, monkeypatch):
    def no_memory(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(main, "train", no_memory)
    assert main.main([]) == 2
    assert "--tasks-at-once" in capsys.readouterr().err


def test_tasks_that_do_not_fit_into_the_memory_are_refused_as_such(tmp_path):
    """Under a limit of the system's, which comes before what the flags say."""
    code = (
        "import main, resource, sys, trainer\n"
        "taken = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (taken + 2**29,) * 2)\n"
        "sys.exit(main.main(sys.argv[1:]))"
    )
    flags = [
        "-k",
        "100000",
        "--meta-batch-size",
        "1000",
        "--compile",
        "off",
        "--checkpoint-path",
        str(tmp_path / "runs"),
    ]
    run = subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.splitlines()[-1].startswith("main.py: error: out of memory")


def test_samples_on_a_checkpoint_are_held_against_its_query():
    saved = resolve("--samples", "50")
    assert config.resolve_from(saved, {"samples": 50}, evaluate=False) == saved
    with pytest.raises(UsageError, match="-q 20 disagrees"):
        config.resolve_from(saved, {"samples": 30}, evaluate=False)
    assert config.resolve_from(saved, {"samples": 30, "shots": 5}, evaluate=True).queries == 25


def test_help_and_mistakes_need_no_heavy_import():
    code = (
        "import main, sys\n"
        "try: main.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'numpy', 'matplotlib', 'torchvision'} & sys.modules.keys()))"
    )
    for arguments in (["--help"], ["--samples", "3"]):
        run = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert run.stdout.splitlines()[-1] == "[]"


def test_help_shows_every_flag_with_its_default():
    text = " ".join(config.build_parser().format_help().split())
    for name, declaration in config.ALL_FLAGS.items():
        for flag in declaration.names:
            assert flag in text
        assert f"{declaration.help} (default: {config._default_text(name, declaration)})" in text


def test_facts_about_learners_match_the_learners():
    assert config.LEARNERS.keys() == learner.LEARNERS.keys()
    for name, facts in config.LEARNERS.items():
        kinds = {type(layer).__name__ for layer in learner.build_learner(name, 5).modules()}
        assert bool(kinds & {"BatchNorm", "BatchNorm2d"}) == (facts.adapt_norm is not None), name


def test_settings_survive_the_checkpoint_and_nonsense_does_not():
    settings = resolve("--dataset", "omniglot", "--grad-clip", "10")
    plain = config.config_to_plain(settings)
    assert config.config_from_plain(plain) == settings
    for key, value in (
        ("shots", 0),
        ("shots", "1"),
        ("inner_lr", 10**400),
        ("oracle", 1),
        ("seed", True),
        ("dataset", "x"),
    ):
        with pytest.raises(UsageError, match=f"its setting {key} should be"):
            config.config_from_plain(plain | {key: value})
    for broken in (None, [], {}, plain | {"extra": 1}):
        with pytest.raises(UsageError, match="settings"):
            config.config_from_plain(broken)


def test_a_checkpoints_settings_yield_only_where_they_may():
    saved = resolve("--dataset", "omniglot")
    go_on = config.resolve_from(saved, {"iterations": 70_000, "inner_lr": 2.0}, evaluate=False)
    assert go_on.iterations == 70_000
    measured = config.resolve_from(saved, {"shots": 5, "queries": 15, "eval_tasks": 10}, evaluate=True)
    assert (measured.shots, measured.queries, measured.eval_tasks) == (5, 15, 10)
    for given, evaluate in (
        ({"dataset": "sinusoid"}, True),
        ({"inner_lr": 0.4}, True),
        ({"shots": 5}, False),
        ({"seed": 1}, False),
        ({"queries": 2}, False),
        ({"precision": "float64"}, False),
    ):
        (name,) = given
        with pytest.raises(UsageError, match=f"{config.CONFIG_FLAGS[name].names[0]} .* disagrees"):
            config.resolve_from(saved, given, evaluate=evaluate)
