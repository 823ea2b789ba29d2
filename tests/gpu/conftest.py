"""Tests of what runs on a GPU. Some need a real one: without it they are skipped, and say so."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # which Triton's kernels see once, when they are imported


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU, and `make gpu`")
    for item in items:
        if item.get_closest_marker("nvidia") and not torch.cuda.is_available():
            item.add_marker(skip)
