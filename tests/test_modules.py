"""Modules with a life of their own give the numbers of a plain one, or a line that names them."""

import copy
import threading
from functools import partial

import pytest
import torch
from plain_loop import (
    KEYS,
    STEPS,
    algorithm,
    assert_close,
    assert_matches_plain_loop,
    filled,
    meta_gradient,
    plain_predictions,
    vectors,
)
from runs import command
from torch import nn
from torch.func import vmap
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from common.task import loop_over_tasks
from learners.copies import UnfitError
from learners.diagnosis import blame_layer, find_failure
from learners.functional import FunctionalLearner
from learners.modules import convert_type, materialise, unwrap


class Net(nn.Module):
    """The plain network that all others are variants of."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.prepare()

    def prepare(self) -> None:
        pass

    def forward(self, x):
        return self.last(self.first(x).tanh())


# ---- what a pass leaves behind --------------------------------------------------------------


class Features(Net):
    """Keep the features of the last pass, detached ones in a list."""

    def prepare(self):
        self.features, self.history, self.nested = None, [], {"a": []}

    def forward(self, x):
        self.features = self.first(x).tanh()
        self.history.append(self.features.detach())
        self.nested["a"].append(x)
        self.calls = self.__dict__.get("calls", 0) + 1
        return self.last(self.features)


class Memory(Net):
    """Add what the last pass has left, which is nothing if each pass begins anew."""

    def prepare(self):
        self.state = 0.0

    def forward(self, x):
        hidden = self.first(x).tanh() + self.state
        self.state = hidden.detach()
        return self.last(hidden)


class Hooked(Net):
    """Read features that hooks have written: closures over the module, over a list, and its own method."""

    def prepare(self):
        kept = self.kept = []

        def keep(module, inputs, output):
            self.features = output
            kept.append(output)

        self.first.register_forward_hook(keep)
        self.first.register_forward_pre_hook(self.count)
        self.seen = 0

    def count(self, *_):
        self.seen += 1

    def forward(self, x):
        self.kept.clear()
        self.first(x)
        assert self.kept[0] is self.features and self.seen == 1
        return self.last(self.features.tanh())


class Store:
    def __init__(self) -> None:
        self.items: list[torch.Tensor] = []


class Stored(Net):
    """Keep tensors in an object of one's own, and in a hook that is an object."""

    def prepare(self):
        self.store = Store()
        self.first.register_forward_hook(partial(self.keep, self.store))

    @staticmethod
    def keep(store, module, inputs, output):
        store.items.append(output)

    def forward(self, x):
        super().forward(x)
        return self.last(self.store.items[-1].tanh())


class Patched(Net):
    """Replace a layer's `forward` by a function that calls the original one."""

    def prepare(self):
        original = self.first.forward
        self.first.forward = lambda x: original(x).tanh()

    def forward(self, x):
        return self.last(self.first(x))


class Listing(Net):
    """Call weights by other names: from a list, and from a dictionary of lists."""

    def prepare(self):
        self.weights = [self.first.weight, self.first.bias]
        self.heads = {"last": [self.last.weight]}

    def forward(self, x):
        return F.linear(F.linear(x, *self.weights).tanh(), *self.heads["last"], self.last.bias)


class Locked(Net):
    """Hold what cannot be copied."""

    def prepare(self):
        self.lock = threading.Lock()
        self.numbers = (number for number in range(3))
        self.computed = self.first.weight * 1.0

    def forward(self, x):
        with self.lock:
            return super().forward(x)


LEAVING = {kind.__name__: kind for kind in (Features, Memory, Hooked, Stored, Patched, Listing, Locked)}


@pytest.mark.parametrize(
    ("kind", "vectorise"), [*((kind, True) for kind in LEAVING), ("Memory", False), ("Hooked", False)]
)
def test_what_a_pass_leaves_in_a_module_changes_nothing(kind, vectorise):
    batch, module, net = vectors(3), filled(LEAVING[kind]()), filled(Net())
    options = {"example": batch.support_x[0], "vectorise": vectorise}
    assert_matches_plain_loop(module, batch, reference=net, **options)
    maml = algorithm(module, **options)
    outputs = maml.predictions(maml.initial_parameters(), batch, STEPS)["transductive"]
    torch.testing.assert_close(outputs, plain_predictions(net, F.mse_loss, batch))
    again = maml.with_options(inner_lr=0.2)  # copies the module as it was given
    assert again.call.draws(batch.support_x[0]) is False


class Outside(Net):
    """Call a layer that is kept where no copy reaches."""

    def prepare(self):
        type(self).kept = (self.first,)

    def forward(self, x):
        return self.last(self.kept[0](x).tanh())


def keep_in_closure(*sizes):
    layer = nn.Linear(*sizes)
    weight = layer.weight
    layer.register_forward_hook(lambda module, inputs, output: output + weight.sum())
    return layer


class Uncopyable(nn.Linear):
    def __deepcopy__(self, memo):
        raise TypeError("one of a kind")


class Acting(nn.Linear):
    """Do something with itself in each pass."""

    def __init__(self, act, *sizes):
        super().__init__(*sizes)
        self.act, self.history = act, torch.zeros(3)
        self.u = nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, x):
        self.act(self)
        return super().forward(x)


def acting(act):
    return partial(Acting, act)


def renew(layer):
    layer.weight = nn.Parameter(layer.weight * 0.5)


def add(layer):
    if not hasattr(layer, "scale"):
        layer.scale = nn.Parameter(torch.ones(3))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Uncopyable, r"its layer 0 \(Uncopyable\) cannot be copied \(one of a kind\)"),
        (
            acting(lambda layer: layer.weight.data.clamp_(0, 1)),
            r"0 \(Acting\) overwrites its weight 0.weight",
        ),
        (acting(lambda layer: setattr(layer.weight, "data", 2 * layer.weight)), "overwrites its weight 0"),
        (acting(lambda layer: setattr(layer.u, "data", layer.weight.data.sum(1))), "assigns to 0.u.data"),
        (acting(renew), "overwrites its weight 0.weight"),
        (lambda *_: Outside(), r"its layer 0.first \(Linear\) is called by a function"),
        (keep_in_closure, "a function keeps 0.weight, which the inner loop cannot replace"),
        (acting(add), r"its layer 0 \(Acting\) makes 0.scale in a forward pass"),
        (acting(lambda layer: layer.history.add_(1)), "forward pass to a tensor that is no buffer"),
        (lambda *sizes: torch.jit.script(nn.Linear(*sizes)), "its layer 0 .* is scripted"),
        (lambda *sizes: nn.LazyLinear(sizes[1]), "has lazy layers"),
    ],
)
def test_a_module_that_is_no_function_of_its_weights_is_refused_by_name(kind, expected):
    with pytest.raises(UnfitError, match=expected):
        FunctionalLearner(nn.Sequential(kind(3, 4), nn.Tanh(), nn.Linear(4, 2)), example=torch.ones(5, 3))


# ---- weights and wrappers of every kind ------------------------------------------------------


class ComplexNet(nn.Module):
    """A complex layer and a complex buffer, as in rotary embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))
        self.register_buffer("turn", torch.polar(torch.ones(4), torch.linspace(0, 3, 4)))
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        hidden = (x.to(self.weight.dtype) @ self.weight.T) * self.turn
        return self.last(hidden.real.tanh() + hidden.imag.sin())


class RealNet(nn.Module):
    """The same in real numbers."""

    def __init__(self, other: ComplexNet) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.view_as_real(other.weight.detach()).clone())
        self.turn, self.last = torch.view_as_real(other.turn), other.last

    def forward(self, x):
        real, imaginary = (x @ self.weight[..., part].T for part in (0, 1))
        a, b = self.turn.unbind(-1)
        return self.last((real * a - imaginary * b).tanh() + (real * b + imaginary * a).sin())


def test_complex_weights_and_buffers_are_adapted_as_pairs_of_real_numbers():
    module = convert_type(ComplexNet(), torch.float64)
    assert module.weight.dtype == module.turn.dtype == torch.complex128
    assert module.turn.imag.abs().max() > 0.1
    batch = vectors(3)
    assert_matches_plain_loop(module, batch, reference=RealNet(module), example=batch.support_x[0])


def with_more(net):
    net.first.register_parameter("table", nn.Parameter(torch.arange(4), requires_grad=False))
    net.device, net.dtype = torch.device("cpu"), "a name"
    return net


WRAPPED = {
    "compiled in place": lambda net: (net.compile(), net)[1],
    "compiled within": lambda net: (setattr(net, "first", torch.compile(net.first)), net)[1],
    "both": lambda net: nn.DataParallel(torch.compile(net)),
    "integers, own device and type": with_more,
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrapped_networks_have_the_numbers_of_the_plain_one(kind):
    batch, net = vectors(3), filled(Net())
    module = unwrap(WRAPPED[kind](copy.deepcopy(net)))
    assert_matches_plain_loop(module, batch, reference=net, example=batch.support_x[0])


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_the_hook_of_weight_norm_has_the_gradient_of_the_parametrisation():
    """Which is exact (test_operators.py)."""
    batch, sorted_gradients = vectors(3), []
    for norm in (torch.nn.utils.weight_norm, parametrizations.weight_norm):
        module = filled(Net())
        norm(module.first)
        gradients = meta_gradient(algorithm(module, example=batch.support_x[0]), batch, "adjoint").gradients
        values = sorted(gradients.values(), key=lambda g: (g.shape, g.sum().item()))
        sorted_gradients.append(dict(enumerate(values)))
    assert_close(*sorted_gradients)


def test_a_network_that_fails_in_another_precision_is_refused_in_a_line():
    with pytest.raises(UnfitError, match=r"the network \(ComplexNet\) fails in bfloat16: "):
        FunctionalLearner(ComplexNet(), compute_dtype=torch.bfloat16, example=torch.ones(5, 3))


def test_lazy_layers_take_their_sizes_from_an_example_and_keep_their_modes():
    module = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Dropout(), nn.LazyLinear(2))
    module[2].eval()
    materialise(module, torch.ones(5, 3))
    assert module[0].weight.shape == (4, 3) and module[3].weight.shape == (2, 4)
    assert [layer.training for layer in module] == [True, True, False, True]
    assert module[1].num_batches_tracked == 0
    assert_matches_plain_loop(filled(module), vectors(3))
    beside = nn.Sequential(nn.Linear(3, 3))
    beside[0].unused = nn.LazyLinear(2)
    with pytest.raises(UnfitError, match=r"its layer 0.unused \(LazyLinear\) is lazy"):
        materialise(beside, torch.ones(5, 3))


# ---- what is said ----------------------------------------------------------------------------


class Masked(Net):
    """Take inputs by name, and fail under `vmap` in a function of the network's own."""

    def prepare(self):
        self.mask = Mask()

    def forward(self, *, x, padding):
        return super().forward(x * self.mask(padding)[:, None])


class Mask(nn.Module):
    def forward(self, padding):
        return 1.0 - padding if bool(padding.any()) else torch.ones_like(padding)


def test_the_failing_layer_and_its_line_are_named_for_inputs_by_name():
    call = FunctionalLearner(Masked())
    inputs = {"x": torch.randn(5, 3), "padding": torch.zeros(5)}
    finding = find_failure(call, inputs, KEYS[0], vmap)
    assert (finding.problem, finding.layer, finding.kind) == ("vectorise", "mask", "Mask")
    assert finding.reason.startswith("test_modules.py:")
    assert find_failure(call, inputs, KEYS[0], loop_over_tasks) is None


def test_an_error_on_the_inputs_of_a_task_names_the_layer():
    module = Net()
    with pytest.raises(ValueError, match=r", in its layer last \(Linear\)$"), blame_layer(module):
        module.last(torch.ones(5, 7))
    with pytest.raises(RuntimeError, match=r"^mine$"), blame_layer(Net()):
        raise RuntimeError("mine")


def test_parameters_that_pytorch_does_not_see_are_counted_and_named(tmp_path, capsys):
    (tmp_path / "own.py").write_text(
        "from torch import nn\n\n\nclass Hides(nn.Linear):\n    def __init__(self, outputs):\n"
        "        super().__init__(1, outputs)\n        self.layers = [nn.Linear(1, 1)]\n\n"
        "    def forward(self, x):\n        return super().forward(self.layers[0](x))\n"
    )
    own = ["--learner", tmp_path / "own.py:Hides", "--checkpoint-path", tmp_path, "--run-name", "a"]
    assert command(*own, "--iterations", 1, "--eval-tasks", 2, "--val-tasks", 2, "--compile", "off") == 0
    assert "The learner keeps 2 parameters where PyTorch does not look" in capsys.readouterr().err
