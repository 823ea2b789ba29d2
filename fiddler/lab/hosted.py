"""A real model on a described machine, for `device="sim:MACHINE"`: all that an engine takes from the lab."""

from math import prod
from typing import Any

from fiddler.cost.model import Contention, CostModel, Curve, Dense, ExpertCosts, Moves
from fiddler.lab.machine import Machine, expert_costs
from fiddler.models.loaded import LoadedModel
from fiddler.types import ExpertWeights


def described_costs(name_or_file: str, loaded: LoadedModel) -> CostModel:
    """Return what a loaded model takes on a described machine: rooflines of its bytes and operations.

    Attention to the context is not counted: its time does not grow with the past. Raises `ConfigError` for an
    unknown machine.
    """
    machine = Machine.load(name_or_file)
    experts = tuple(_expert_on(machine, loaded.weights(layer, 0)) for layer in range(len(loaded.n_experts)))
    embeddings: Any = loaded.model.get_input_embeddings()
    head: Any = loaded.model.get_output_embeddings() or embeddings
    ends = {id(embeddings.weight), id(head.weight)}
    per_layer = sum(p.nbytes for p in loaded.model.parameters() if id(p) not in ends) / len(experts)
    row_bytes = embeddings.weight.shape[1] * embeddings.weight.itemsize
    return CostModel(
        experts=experts,
        contention=Contention(machine.cpu_slowdown_beside_link, machine.link_slowdown_beside_cpu),
        moves=Moves(machine.move_fixed_s, 2 * row_bytes / machine.link_bytes_per_s),
        dense=Dense(rows=_dense_on(machine, per_layer), head=_dense_on(machine, head.weight.nbytes)),
        host_s=machine.host_layer_s,
    )


def _dense_on(machine: Machine, nbytes: float) -> Curve:
    # Two operations a weight and row; dense weights are counted as 16-bit ones, whatever they are here.
    read_s, row_s = nbytes / machine.gpu_read_bytes_per_s, nbytes / machine.gpu_flop_per_s
    return Curve.roofline(machine.dense_launch_s, read_s, row_s)


def _expert_on(machine: Machine, weights: ExpertWeights) -> ExpertCosts:
    return expert_costs(machine, weights.nbytes, 2.0 * sum(prod(m.shape) for m in weights.matrices))
