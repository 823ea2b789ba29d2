"""Triton's kernels run in its interpreter where there is no GPU: they see it once, when they are imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
