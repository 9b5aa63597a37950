"""What is set up for a processor: products stay exact to float32, whichever library multiplies."""

import os
import time

import pytest
import torch
from runs import command

from common.device import choose_products, warn_if_not_faster

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _as_before():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("small_tensors", [False, True])
def test_products_have_the_digits_of_float32(small_tensors):
    choose_products(CPU, "float32", small_tensors=small_tensors)
    a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0)).unbind()
    exact = a.double() @ b.double()
    assert (a @ b - exact).norm() < 1e-6 * exact.norm()


def test_a_library_that_rounds_is_not_taken(monkeypatch):
    """As oneDNN would on a processor that multiplies bfloat16 faster."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr("common.device.Path.exists", lambda path: True)
    monkeypatch.setattr("common.device.Path.read_text", lambda path, encoding: "AuthenticAMD")
    choose_products(CPU, "float32", small_tensors=True)
    assert torch.get_float32_matmul_precision() == "highest"  # MKL takes less time for small ones

    def multiply(a, b):
        rounds = torch.get_float32_matmul_precision() == "medium" and a.dtype == torch.float32
        return torch.matmul(a.bfloat16(), b.bfloat16()).float() if rounds else torch.matmul(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", multiply)
    choose_products(CPU, "float32", small_tensors=False)
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(
    ("device", "precision", "setting"),
    [("cuda", "tf32", "high"), ("cpu", "bf16-products", "medium"), ("cpu", "float64", "highest")],
)
def test_products_are_rounded_on_request_and_not_set_for_other_devices(device, precision, setting):
    torch.set_float32_matmul_precision("high")  # as --precision tf32 does
    choose_products(torch.device(device), precision, small_tensors=False)
    assert torch.get_float32_matmul_precision() == setting


def test_a_precision_that_saves_no_time_is_said(monkeypatch):
    """As on a processor that has no bfloat16 products: they are emulated, or are not done at all."""

    def multiply(a, b):
        time.sleep(0.002 * (a.dtype == torch.bfloat16))
        return torch.matmul(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", multiply)
    warn_if_not_faster.cache_clear()
    with pytest.warns(UserWarning, match="bf16 saves no time"):
        warn_if_not_faster("bf16")
    torch.set_float32_matmul_precision("highest")
    with pytest.warns(UserWarning, match="bf16-products is float32"):
        warn_if_not_faster("bf16-products")


def test_threads_sleep_soon_unless_the_user_decides(tmp_path, monkeypatch):
    for chosen, expected in ((None, "4000"), ("9", "9")):
        monkeypatch.setenv("GOMP_SPINCOUNT", chosen or "")  # so that it is restored afterwards
        if not chosen:
            monkeypatch.delenv("GOMP_SPINCOUNT")
        command("--list", tmp_path)
        assert os.environ["GOMP_SPINCOUNT"] == expected
