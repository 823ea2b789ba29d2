"""llama.cpp on the same weights, through llama-cpp-python's thin layer over its C functions."""

import ctypes
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.machine import free_bytes
from bench.peers import gguf_file
from bench.peers.peer import Picks, Tokens, installed, require, timed
from bench.workload import Run, UnavailableError, Workload

N_BATCH = 512
"""Tokens of prompts computed at once, llama.cpp's own choice."""
Row = tuple[int, int, int, bool]
"""A token, its position, its sequence, and whether the logits after it are wanted."""


def open_peer(name: str, folder: Path, threads: int) -> "LlamaCppPeer":
    """Open llama.cpp on the checkpoint, written as a GGUF file first.

    Raises `UnavailableError` where a package is missing, llama.cpp does not know the model, or memory has no room.
    """
    llama = installed("llama_cpp", "llama-cpp-python")
    logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL + 1)
    file = gguf_file.of(folder)
    require("memory", file.stat().st_size, free_bytes())
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(str(file).encode(), llama.llama_model_default_params())
    if not model:
        raise UnavailableError(f"llama.cpp {llama.__version__} cannot load {file.name}")
    return LlamaCppPeer(llama, model, threads)


class LlamaCppPeer:
    """A model that llama.cpp has mapped."""

    def __init__(self, llama: Any, model: Any, threads: int) -> None:
        self._llama = llama
        self._model = model
        self._threads = threads
        self._context: Context | None = None

    def run(self, workload: Workload, prompts: Tokens, made: Tokens, patience_s: float) -> Run:
        """Run a workload, see `Peer`: all sequences side by side in one batch a step."""
        if workload.n_beams > 1:
            raise UnavailableError("llama.cpp has no beam search")
        context = self.context(workload.n_sequences, workload.n_input + workload.n_output)
        last = workload.n_input - 1
        rows = [
            (token, at, sequence, at == last)
            for sequence, ids in enumerate(prompts)
            for at, token in enumerate(ids)
        ]

        def step(i: int) -> Picks:
            return context.picks(
                [(ids[i], workload.n_input + i, sequence, True) for sequence, ids in enumerate(made)]
            )

        try:
            return timed(lambda: context.picks(rows), step, workload.n_output, patience_s)
        except RuntimeError as error:
            raise UnavailableError(str(error)) from error

    def context(self, n_sequences: int, n_positions: int) -> "Context":
        """Return an empty context for so many sequences, each of so many tokens. Raises `UnavailableError`."""
        if self._context is None or self._context.room != (n_sequences, n_positions):
            self._close_context()
            self._context = Context(self._llama, self._model, n_sequences, n_positions, self._threads)
        self._context.clear()
        return self._context

    def close(self) -> None:
        """Let go of the weights."""
        self._close_context()
        self._llama.llama_model_free(self._model)
        self._model = None

    def _close_context(self) -> None:
        if self._context is not None:
            self._context.close()
            self._context = None


class Context:
    """llama.cpp's working memory: keys and values of `n_sequences` sequences, and one batch."""

    def __init__(self, llama: Any, model: Any, n_sequences: int, n_positions: int, threads: int) -> None:
        self.room = (n_sequences, n_positions)
        self._llama = llama
        params = llama.llama_context_default_params()
        params.n_ctx = n_sequences * n_positions
        params.n_seq_max = n_sequences
        params.n_batch = params.n_ubatch = N_BATCH
        params.n_threads = params.n_threads_batch = threads
        self._context = llama.llama_init_from_model(model, params)
        if not self._context:
            raise UnavailableError(
                f"llama.cpp cannot make room for {n_sequences} sequences of {n_positions} tokens"
            )
        self._n_vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        self._batch = llama.llama_batch_init(N_BATCH, 0, 1)

    def picks(self, rows: Sequence[Row]) -> Picks:
        """Decode the rows and return the likeliest token after each wanted one. Raises `RuntimeError`."""
        picks: Picks = []
        for start in range(0, len(rows), N_BATCH):
            picks += [int(logits.argmax()) for logits in self.decode(rows[start : start + N_BATCH])]
        return picks

    def decode(self, rows: Sequence[Row]) -> list[np.ndarray[Any, Any]]:
        """Decode at most `N_BATCH` rows and return the logits `[V]` after each wanted one.

        They are views, valid until the next call. Raises `RuntimeError` where llama.cpp fails.
        """
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, is_wanted) in enumerate(rows):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = is_wanted
        status = self._llama.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama.cpp's llama_decode returned {status}")
        return [self._logits(i) for i, row in enumerate(rows) if row[-1]]

    def _logits(self, i: int) -> np.ndarray[Any, Any]:
        values = self._llama.llama_get_logits_ith(self._context, ctypes.c_int32(i))
        return np.ctypeslib.as_array(values, (self._n_vocabulary,))

    def clear(self) -> None:
        """Forget all sequences."""
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), False)

    def close(self) -> None:
        """Free the memory."""
        self._llama.llama_batch_free(self._batch)
        self._llama.llama_free(self._context)
