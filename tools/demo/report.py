"""Measure a finished checkpoint on the held-out text, and write the numbers and the model card beside it."""

from __future__ import annotations

import json
import lzma
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3MoeForCausalLM

from tools.demo import card, corpus, dispatch, packages, train, windows
from tools.demo.model import TRAINED_CONTEXT

# Each window predicts its last STRIDE tokens, so all but a domain's first are predicted from 256 or more.
STRIDE = TRAINED_CONTEXT - 256


def write(folder: Path, text: corpus.Corpus, progress: train.Progress, cache: Path) -> None:
    """Write ``report.json`` and ``README.md`` into the folder of the checkpoint."""
    dispatch.register()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.set_experts_implementation(dispatch.NAME)
    usage = ExpertUsage(model)
    domains = {domain: _measure(model, tokenizer, text, domain, usage) for domain in corpus.DOMAINS}
    for domain, share in text.overlap.items():
        domains[domain]["eight_word_runs_seen_in_training"] = round(share, 4)
    report = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "parameters_a_token": _active_parameters(model),
        "training": {
            "minutes": round(progress.seconds / 60, 1),
            "steps": progress.steps,
            "tokens": progress.tokens,
            "final_loss_a_token": round(progress.loss, 4),
        },
        "context": {"trained": TRAINED_CONTEXT, "measured": TRAINED_CONTEXT, "stride": STRIDE},
        "held_out": {**domains, "overall": _overall(domains)},
        "experts": usage.summary(),
        "packages": {
            package: packages.version(package, cache)
            for source in corpus.SOURCES.values()
            for package in source.PACKAGES
        },
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card.render(report), encoding="utf-8")


class ExpertUsage:
    """Counts which experts the routers choose, by domain and layer."""

    def __init__(self, model: Qwen3MoeForCausalLM) -> None:
        self._domain = ""
        self._shape = (model.config.num_hidden_layers, model.config.num_experts)
        self._chosen = model.config.num_experts_per_tok
        self._counts: dict[str, torch.Tensor] = {}
        self._reused: dict[str, list[float]] = {}
        for index, layer in enumerate(model.model.layers):
            layer.mlp.gate.register_forward_hook(self._hook(index))

    def start(self, domain: str) -> None:
        """Count for ``domain`` from here on."""
        self._domain = domain
        self._counts[domain] = torch.zeros(self._shape, dtype=torch.float64)
        self._reused[domain] = []

    def summary(self) -> dict[str, Any]:
        """Return the shares of each expert, and how far they differ between domains."""
        shares = {domain: counts / counts.sum(1, keepdim=True) for domain, counts in self._counts.items()}
        distances = {
            f"{a} / {b}": float((shares[a] - shares[b]).abs().sum(1).mean() / 2) for a, b in combinations(shares, 2)
        }
        every = torch.stack(list(shares.values())).mean(0)
        return {
            "locality": round(sum(distances.values()) / len(distances), 4),
            "locality_meaning": "mean total-variation distance of expert shares between two domains, over layers",
            "distance": {pair: round(distance, 4) for pair, distance in distances.items()},
            "least_share_of_an_expert": round(float(every.min()), 4),
            "even_share": round(1 / self._shape[1], 4),
            "reused_from_previous_token": {
                domain: round(sum(values) / len(values), 4) for domain, values in self._reused.items()
            },
            "reused_by_chance": round(self._chosen / self._shape[1], 4),
            "share_by_domain_and_layer": {
                domain: [[round(value, 4) for value in layer] for layer in table.tolist()]
                for domain, table in shares.items()
            },
        }

    def _hook(self, layer: int) -> Any:
        def count(module: torch.nn.Module, inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
            chosen = output[2]
            self._counts[self._domain][layer] += torch.bincount(chosen.flatten(), minlength=self._shape[1])
            # One window is one row, so consecutive entries are consecutive tokens.
            same = (chosen[1:, :, None] == chosen[:-1, None, :]).any(-1)
            self._reused[self._domain].append(float(same.float().mean()))

        return count


@torch.inference_mode()
def token_bits(model: Qwen3MoeForCausalLM, tokens: list[int]) -> float:
    """Return how many bits the model needs for all tokens but the first, read in overlapping windows."""
    total = 0.0
    stream = torch.tensor(tokens)
    predicted = 1
    while predicted < len(stream):
        end = min(len(stream), max(predicted + STRIDE, TRAINED_CONTEXT))
        window = stream[max(0, end - TRAINED_CONTEXT) : end]
        logits = model(input_ids=window[None], use_cache=False).logits[0]
        fresh = end - predicted
        losses = F.cross_entropy(logits[-fresh - 1 : -1].float(), window[-fresh:], reduction="sum")
        total += losses.item() / math.log(2)
        predicted = end
    return total


def _measure(
    model: Qwen3MoeForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    text: corpus.Corpus,
    domain: str,
    usage: ExpertUsage,
) -> dict[str, Any]:
    usage.start(domain)
    tokens = []
    for document in text.held_out:
        if document.domain == domain:
            tokens += [tokenizer.pad_token_id, *windows.encode(tokenizer, document.text)]
    held_out = corpus.text_of(text.held_out, domain).encode()
    packed = len(lzma.compress(held_out, preset=9))
    bits = token_bits(model, tokens)
    return {
        "training_bytes": len(corpus.text_of(text.training, domain).encode()),
        "held_out_bytes": len(held_out),
        "tokens": len(tokens),
        "bits": round(bits),
        "xz_bits": 8 * packed,
        "bits_per_byte": round(bits / len(held_out), 4),
        "xz_bits_per_byte": round(8 * packed / len(held_out), 4),
    }


def _overall(domains: dict[str, dict[str, Any]]) -> dict[str, Any]:
    size = sum(numbers["held_out_bytes"] for numbers in domains.values())
    return {
        "training_bytes": sum(numbers["training_bytes"] for numbers in domains.values()),
        "held_out_bytes": size,
        "bits_per_byte": round(sum(numbers["bits"] for numbers in domains.values()) / size, 4),
        "xz_bits_per_byte": round(sum(numbers["xz_bits"] for numbers in domains.values()) / size, 4),
    }


def _active_parameters(model: Qwen3MoeForCausalLM) -> int:
    config = model.config
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    every = sum(parameter.numel() for parameter in model.parameters())
    return every - experts + experts * config.num_experts_per_tok // config.num_experts
