"""A linear layer multiplies with the kernel chosen for its weight as it is now, and enters few functions."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fiddler.devices.kernels import BUCKETS, TIE, KernelName, Kernels, linear, shape_key
from fiddler.devices.native import native
from fiddler.models import dense
from tests.support.entries import entries

NAMES: list[KernelName] = ["linear", "rows_last", "vector", "native"]
ROWS = (1, 2, 3, 5, 8, 33, 300, TIE)


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """The thread count and no gradients."""
    before = torch.get_num_threads()
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def layer(name: KernelName, *, bias: bool = False, columns_first: bool = False) -> tuple[Any, Kernels]:
    """Return a linear layer whose weight takes a kernel; `vector` for one row, and `linear` for others then."""
    if name == "native" and native() is None:
        pytest.skip("this machine has no gcc")
    with torch.inference_mode(False):
        module = nn.Linear(64, 40, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
        if columns_first:
            module.weight.data = module.weight.data.t().contiguous().t()
    key = shape_key(module.weight)
    names = {rows: name for rows in BUCKETS if name != "vector" or rows == 1}
    kernels = Kernels({(key, rows): name for rows, name in names.items()}, native())
    dense.accelerate(module, kernels)
    return module, kernels


def plainly(module: Any, kernels: Kernels, x: Tensor) -> Tensor:
    """Return what the kernel gives that is looked up anew."""
    return kernels.pick(module.weight, x.shape[0])(x, module.weight, module.bias)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("bias", "columns_first"), [(False, False), (True, False), (True, True)])
def test_every_row_count_gives_its_kernel_s_bits(name: KernelName, bias: bool, columns_first: bool) -> None:
    module, kernels = layer(name, bias=bias, columns_first=columns_first)
    for n_rows in ROWS:
        x = random(n_rows, 64, seed=n_rows)
        expected = plainly(module, kernels, x)
        for _ in range(2):  # chosen, then remembered
            assert torch.equal(module(x), expected)
            assert torch.equal(module(x[None]), expected[None])


@pytest.mark.parametrize("name", NAMES)
def test_no_rows_and_one_vector(name: KernelName) -> None:
    module, kernels = layer(name, bias=True)
    assert module(random(0, 64)).shape == (0, 40)
    assert module(random(2, 0, 64)).shape == (2, 0, 40)
    assert torch.equal(module(random(64)), plainly(module, kernels, random(1, 64))[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_may_be_replaced(name: KernelName) -> None:
    module, kernels = layer(name)
    x = random(2, 64)
    module(x)
    own = module.weight.data
    for other in (random(40, 64, seed=3), random(24, 64, seed=4), own[:, :].t().contiguous().t(), own[::2], own):
        module.weight.data = other
        assert torch.equal(module(x), plainly(module, kernels, x))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        module.to(dtype)
        assert torch.equal(module(x.to(dtype)), plainly(module, kernels, x.to(dtype)))
    module.weight.data.zero_()
    assert not module(x).any()


def test_the_thread_count_may_change() -> None:
    module, kernels = layer("native")
    x = random(2, 64)
    for n_threads in (1, 2, 1):
        torch.set_num_threads(n_threads)
        assert torch.equal(module(x), plainly(module, kernels, x))


def test_what_is_remembered_is_bounded() -> None:
    module, kernels = layer("rows_last")
    for n_rows in (*range(1, 20), TIE, TIE + 1, 3 * TIE):
        module(random(n_rows, 64))
    assert len(kernels.products) == 19


@pytest.mark.parametrize(("name", "most"), [("linear", 1), ("rows_last", 2), ("vector", 2), ("native", 2)])
def test_a_linear_layer_enters_at_most_two_functions(name: KernelName, most: int) -> None:
    module, _ = layer(name, bias=True)
    x = random(1, 1, 64)
    module(x)
    assert len(entries(lambda: module(x))) <= most


@pytest.mark.parametrize("shape", [(1, 64), (5, 64), (2, 5, 64)])
def test_a_router_s_weight_enters_two_functions(shape: tuple[int, ...]) -> None:
    with torch.inference_mode(False):
        router = nn.Module()
        router.weight = nn.Parameter(random(8, 64), requires_grad=False)
    dense.accelerate(router, Kernels())
    x, weight = random(*shape), router.weight
    rows = x.reshape(-1, 64)
    expected = linear(rows, weight.as_subclass(Tensor), None).view(*shape[:-1], 8)
    assert torch.equal(F.linear(x, weight), expected)
    assert len(entries(lambda: F.linear(x, weight))) == 2
