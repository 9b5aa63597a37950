"""The benchmark of rounding: every product that its table names is rounded, and no other."""

import pytest
import rounding
import torch
from harness import write_images
from tool import assemble, make_meta_gradient


@pytest.fixture(scope="module")
def meta_gradient(tmp_path_factory):
    """Return a function that gives the meta-gradient of two tasks of noise as one vector."""
    write_images(folder := tmp_path_factory.mktemp("noise") / "images", 20, 2, 20)
    text = rounding.FLAGS.replace("omniglot", f"images:{folder}")
    text += " -n 3 -s 2 --image-size 20 --channels 1 --learner conv --meta-batch-size 2 --no-check-gradients"
    run = assemble(text.split())
    batch = run.distribution.sample("train", 0, 0, range(2))

    def compute() -> torch.Tensor:  # a way is made anew: it takes what is patched at the time
        gradients = make_meta_gradient(run.maml, engine="adjoint")(run.parameters, batch).gradients
        return torch.cat([gradient.flatten() for gradient in gradients.values()])

    return compute


@pytest.fixture(scope="module")
def exact(meta_gradient) -> torch.Tensor:
    unrounded = meta_gradient()
    with rounding.rounding(frozenset()):
        assert torch.equal(meta_gradient(), unrounded)
    return unrounded


@pytest.mark.parametrize("part", sorted(rounding.ALL), ids=" ".join)
def test_each_product_can_be_rounded_alone(part, meta_gradient, exact):
    with rounding.rounding(frozenset({part})):
        assert not torch.allclose(meta_gradient(), exact, rtol=1e-6, atol=1e-9)
    with rounding.rounding(frozenset({part}), first_layer=False):
        assert not torch.allclose(meta_gradient(), exact, rtol=1e-6, atol=1e-9)
