"""A program that repacks every expert of a folder, and watches the memory that is nobody's file.

Prints the megabytes it took, and those that the experts have, as JSON. Run by `test_repacked.py` in a process of
its own.
"""

import json
import sys
from pathlib import Path

import torch

from fiddler.store.checkpoint import Checkpoint
from fiddler.store.mapped import ExpertParts, Layout, MappedStore, View
from tests.support.loaded_memory import anonymous_mb


def main(folder: str, n_experts: int) -> tuple[float, float]:
    names = [[f"experts.{e}.{kind}_proj.weight" for kind in ("gate", "up", "down")] for e in range(n_experts)]
    parts = tuple(ExpertParts((View(gate), View(up)), View(down)) for gate, up, down in names)
    store = MappedStore(Checkpoint.open(Path(folder)), Layout((parts,)), torch.bfloat16)
    store.weights(0, 0)  # torch's own memory is taken by now
    before = anonymous_mb()
    n_bytes = sum(store.weights(0, expert).nbytes for expert in range(1, n_experts))
    return anonymous_mb() - before, n_bytes / (1 << 20)


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]))))
