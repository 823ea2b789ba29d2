"""Tests of a real GPU: `make gpu`. Without one they are skipped, and say so."""

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU, and `make gpu`")
    for item in items:
        if item.path.parent.name == "gpu":
            item.add_marker("gpu")
            if not torch.cuda.is_available():
                item.add_marker(skip)
