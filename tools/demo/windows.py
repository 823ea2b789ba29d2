"""Encode the training documents and cut them into shuffled windows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from tools.demo.document import Document

# A round reads the smaller of the domains twice.
REPEATS = {"jargon": 2, "manual": 2}


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Return the tokens of a text of any length."""
    tokens: list[int] = tokenizer.backend_tokenizer.encode(text).ids
    return tokens


def encode_training(tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> list[np.ndarray]:
    """Return the tokens of each document, as often as its domain is read in one round."""
    separator = tokenizer.pad_token_id
    encoded = []
    for document in documents:
        tokens = np.array([separator, *encode(tokenizer, document.text)], dtype=np.uint16)
        encoded += [tokens] * REPEATS.get(document.domain, 1)
    return encoded


def batches(documents: list[np.ndarray], context: int, tokens_a_batch: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield batches without end; each round joins the documents in a new order and cuts them anew."""
    rng = np.random.default_rng(seed)
    rows = tokens_a_batch // context
    while True:
        order = rng.permutation(len(documents))
        stream = np.concatenate([documents[i] for i in order])
        windows = stream[: len(stream) // context * context].reshape(-1, context)
        # Neighbouring windows are of one document, and a batch should be a mixture.
        windows = windows[rng.permutation(len(windows))]
        for start in range(0, len(windows) - rows + 1, rows):
            yield torch.from_numpy(windows[start : start + rows].astype(np.int64))
