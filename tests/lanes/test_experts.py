"""The work behind jobs: what fails is named, what is let go is skipped, and failed rows count as zero."""

from collections.abc import Sequence

import torch

from fiddler.devices.cpu import CpuDevice
from fiddler.devices.formula import ExpertFormula
from fiddler.devices.kernels import Kernels
from fiddler.lanes.experts import Ask, ExpertWork, HostCrossing
from fiddler.scheduler.layer import Layer, Wave
from fiddler.scheduler.messages import CopyExpert, RunDense, RunExperts
from fiddler.scheduler.routing import LayerWork, Load
from fiddler.types import ExpertWeights

LOADS = (Load(0, 0, 2), Load(1, 2, 3), Load(2, 3, 5))
BROKEN = RuntimeError("broken")


class Memory:
    """An accelerator whose experts are those of the host, times ten; `broken` ones do not arrive."""

    def __init__(self, broken: set[int]) -> None:
        self.broken = broken
        self.slots: dict[int, int] = {}

    def copy(self, layer: int, expert: int, slot: int) -> None:
        if expert in self.broken:
            raise BROKEN
        self.slots[slot] = expert

    def weights(self, layer: int, slots: Sequence[int]) -> list[ExpertWeights]:
        return [scaled(10.0 * (self.slots[slot] + 1)) for slot in slots]


def scaled(factor: float) -> ExpertWeights:
    """An expert without a gate that multiplies by `factor`."""
    return ExpertWeights((torch.eye(4),), torch.eye(4) * factor)


def host(broken: frozenset[int] = frozenset()) -> CpuDevice:
    def weights(layer: int, expert: int) -> ExpertWeights:
        if expert in broken:
            raise BROKEN
        return scaled(float(expert + 1))

    formula = ExpertFormula(gated=False, activation=torch.nn.Identity(), gate=None, post_norm=None)
    return CpuDevice(weights, (formula,), Kernels())


def begun(crossing: HostCrossing) -> Layer:
    """Return a layer of five rows, in the loads' order, each of a token with one visit."""
    work = LayerWork(0, LOADS, tuple(range(5)))
    crossing.announce(Ask(0, torch.ones(5, 4), torch.tensor([[0], [0], [1], [2], [2]]), torch.ones(5, 1), None))
    return Layer(Wave(), work, 5, 1, tensors=crossing.open(work))


def on_cpu(layer: Layer, *loads: Load) -> RunExperts:
    return RunExperts(0, "cpu", layer, loads, (), 0.0)


def from_slot(layer: Layer) -> RunExperts:
    return RunExperts(1, "gpu", layer, (LOADS[2],), (5,), 0.0)


def test_loads_write_their_own_rows() -> None:
    work = ExpertWork(host())
    crossing = HostCrossing()
    layer = begun(crossing)
    assert work(on_cpu(layer, LOADS[2])) == {}
    assert work(on_cpu(layer, *LOADS[:2])) == {}
    assert crossing.results(layer)[:, 0].tolist() == [1.0, 1.0, 2.0, 3.0, 3.0]
    counters = work.counters["cpu"]
    assert (counters.n_loads, counters.n_rows) == (3, 5)


def test_an_expert_that_fails_is_named_and_the_others_run() -> None:
    work = ExpertWork(host(frozenset({1})))
    crossing = HostCrossing()
    layer = begun(crossing)
    assert work(on_cpu(layer, *LOADS)) == {1: BROKEN}
    assert crossing.results(layer, failed=[LOADS[1]])[:, 0].tolist() == [1.0, 1.0, 0.0, 3.0, 3.0]
    assert work.counters["cpu"].n_loads == 2


def test_a_gpu_load_reads_its_slot() -> None:
    work = ExpertWork(host(), Memory(set()))
    crossing = HostCrossing()
    layer = begun(crossing)
    assert work(CopyExpert(0, 0, 2, 5, True, 0.0)) == {}
    assert work(from_slot(layer)) == {}
    assert crossing.results(layer)[3:, 0].tolist() == [30.0, 30.0]
    assert work.counters["link"].n_bytes == scaled(1.0).nbytes


def test_a_copy_that_fails_is_named_and_not_counted() -> None:
    work = ExpertWork(host(), Memory({2}))
    assert work(CopyExpert(0, 0, 2, 5, True, 0.0)) == {2: BROKEN}
    assert work.counters["link"].n_loads == 0


def test_a_slot_that_cannot_be_read_fails_its_load() -> None:
    work = ExpertWork(host(), Memory(set()))
    crossing = HostCrossing()
    layer = begun(crossing)
    (error,) = work(from_slot(layer)).values()
    assert isinstance(error, KeyError)


def test_work_for_a_layer_that_was_let_go_is_skipped() -> None:
    work = ExpertWork(host())
    crossing = HostCrossing()
    layer = begun(crossing)
    crossing.let_go(layer)
    assert work(on_cpu(layer, *LOADS)) == {}
    assert work.counters["cpu"].n_loads == 0


def test_a_dense_part_is_no_work_here() -> None:
    assert ExpertWork(host())(RunDense(0, Wave(), 1.0)) == {}
