"""transformers' own logits processors for one request, in transformers' own order."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import (
    EtaLogitsWarper,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    SequenceBiasLogitsProcessor,
)


class _Chooser(GenerationMixin):
    """The parts of a model that transformers' choice of processors reads."""

    def __init__(self, n_vocabulary: int) -> None:
        text = SimpleNamespace(vocab_size=n_vocabulary)
        self.config: Any = SimpleNamespace(is_encoder_decoder=False, get_text_config=lambda: text)


def logits_processors(
    options: Mapping[str, Any],
    prompt_ids: Sequence[int],
    *,
    sample: bool,
    n_most: int,
    eos_token_ids: Sequence[int],
    n_vocabulary: int,
) -> list[LogitsProcessor]:
    """Return what `generate` would run with these options of `GenerationConfig`, after this prompt.

    Each takes ids `[1, T]`, prompt included, and scores `[1, V]`, float32, both on the CPU. `n_most` is the longest
    the sequence may become, in tokens, prompt included. Raises transformers' errors for values that it refuses.
    """
    if not options:
        return []
    config = GenerationConfig()
    for name, value in options.items():
        setattr(config, name, value)
    if options.get("encoder_no_repeat_ngram_size", 0) > len(prompt_ids):
        config.encoder_no_repeat_ngram_size = None  # it bans nothing, and takes time and memory in its size
    config.do_sample = sample
    config.max_length = n_most
    config._eos_token_tensor = _ids(eos_token_ids) if eos_token_ids else None
    chooser: Any = _Chooser(n_vocabulary)
    chosen: list[LogitsProcessor] = chooser._get_logits_processor(
        config, input_ids_seq_length=len(prompt_ids), encoder_input_ids=_ids(prompt_ids)[None], device="cpu"
    )
    for processor in chosen:
        _fix_dtype(processor, options)
    return chosen


def _ids(ids: Sequence[int]) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int64, device="cpu")


def _fix_dtype(processor: LogitsProcessor, options: Mapping[str, Any]) -> None:
    """Make tensors float32 that transformers makes in torch's default dtype, which belongs to the whole process."""
    if isinstance(processor, EtaLogitsWarper):
        processor.epsilon = torch.tensor(options["eta_cutoff"], dtype=torch.float32, device="cpu")
    elif isinstance(processor, SequenceBiasLogitsProcessor):  # its tensor is made later, of these
        processor.sequence_bias = {ids: np.float32(bias) for ids, bias in processor.sequence_bias.items()}
