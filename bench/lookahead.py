"""How often the next layer's experts are known a layer early, and what it costs to ask.

    python -m bench.lookahead [--cache DIR] [--windows 8] [--tokens 256] [--json FILE]

Recall is the share of the next layer's visits that are among the experts expected one layer before. It is measured
with the demo model on the text held out of its training (fetched, and kept in the cache folder), beside what
needs no router: the experts of the token before, and which experts of the next layer followed those of this one in
the other domains. The look-ahead is what `fiddler.models.lookahead` does; the variants feed the next router
something else.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench import machine
from bench.report import command, finish, result, table
from fiddler import DEMO
from fiddler.models import seam
from fiddler.models.loaded import adopt
from fiddler.models.lookahead import Lookahead
from tools.demo import corpus
from tools.demo.__main__ import DEFAULT_CACHE


@dataclass(slots=True)
class Layer:
    """What passed one MoE layer in a forward, a row a token."""

    residual: Tensor
    """`[T, H]`, before the norm whose output the router gets."""
    hidden: Tensor
    index: Tensor
    output: Tensor
    """`[T, H]`, of the experts."""
    ahead: Tensor
    """`[T, K]`, the next layer's experts as expected; of the last layer none."""


def drive(model: Any, ids: Tensor, at: Callable[[seam.ExpertsCall], Tensor]) -> None:
    """Run one forward, its experts by `at`."""
    forward = seam.Forward(lambda: model(ids, use_cache=False))
    call = forward.send()
    while not forward.dead:
        call = forward.send(at(call))


def record(model: Any, lookahead: Lookahead, ids: list[int]) -> list[Layer]:
    """Return what passed the layers of the demo model while it read `ids`."""
    residuals: list[Tensor] = []
    norms = [layer.post_attention_layernorm for layer in model.model.layers]
    hooks = [norm.register_forward_pre_hook(lambda _, args: residuals.append(args[0][0])) for norm in norms]
    experts = list(seam.find_experts(model).values())
    layers: list[Layer] = []

    def at(call: seam.ExpertsCall) -> Tensor:
        ahead, module = lookahead.expects(call.layer, call.hidden), experts[call.layer]
        none = torch.empty(len(call.hidden), 0, dtype=torch.long)
        output: Tensor = type(module).forward.__wrapped__(module, call.hidden, call.index, call.weights)
        layers.append(Layer(residuals[-1], call.hidden, call.index, output, none if ahead is None else ahead))
        return output

    drive(model, torch.tensor([ids]), at)
    for hook in hooks:
        hook.remove()
    return layers


def recall(expected: Tensor, picked: Tensor) -> Tensor:
    """Return which of the visits `[T, K]` were among the expected `[T, any]`, as `[T * K]`."""
    return (picked[:, :, None] == expected[:, None, :]).any(-1).float().flatten()


def variants(model: Any, layers: Sequence[Layer], i: int) -> Iterator[tuple[str, int, Tensor]]:
    """Yield what each variant is called, the layer it is about, and its router's logits `[T, E]`."""
    now = layers[i]
    mine, norm = (model.model.layers[j].post_attention_layernorm for j in (i, i + 1))
    fed = {
        "1 hidden as the experts get it": (i + 1, now.hidden),
        "2 hidden / this norm's weight * the next one's": (i + 1, now.hidden / mine.weight * norm.weight),
        "4 residual + experts' output through the next norm": (i + 1, norm(now.residual + now.output)),
        "1, two layers ahead": (i + 2, now.hidden),
    }
    for name, (at, rows) in fed.items():
        if at < len(layers):
            yield name, at, F.linear(rows, model.model.layers[at].mlp.gate.weight).float()


def transitions(model: Any, texts: Sequence[Sequence[Layer]]) -> Tensor:
    """Return how often expert b of the next layer followed expert a, `[L - 1, E, E]`, as shares of a's visits."""
    n_layers, n_experts = model.config.num_hidden_layers, model.config.num_experts
    counts = torch.full((n_layers - 1, n_experts, n_experts), 1e-3)
    for layers in texts:
        for i in range(n_layers - 1):
            pairs = (layers[i].index[:, :, None] * n_experts + layers[i + 1].index[:, None, :]).flatten()
            counts[i] += torch.bincount(pairs, minlength=n_experts**2).view(n_experts, n_experts)
    return counts / counts.sum(-1, keepdim=True)


def measure(model: Any, texts: Mapping[str, Sequence[Sequence[Layer]]]) -> dict[str, Any]:
    """Return recall by predictor: with as many expected as picked (x1), and with twice as many (x2)."""
    hits: dict[str, dict[int, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    top_k = model.config.num_experts_per_tok
    for domain, windows in texts.items():
        others = transitions(model, [window for name, own in texts.items() if name != domain for window in own])
        for layers in windows:
            for i, (now, then) in enumerate(pairwise(layers)):
                hits["the look-ahead"][i + 1].append(recall(now.ahead, then.index))
                hits["the token before"][i + 1].append(recall(then.index[:-1], then.index[1:]))
                for rank in range(top_k):
                    name = f"precision of the look-ahead's choice {rank + 1}"
                    hits[name][i + 1].append(recall(then.index, now.ahead[:, rank : rank + 1]))
                followed = ("transitions, of other domains", i + 1, others[i][now.index].sum(1))
                for name, at, scores in (*variants(model, layers, i), followed):
                    for n in (1, 2):
                        expected = scores.topk(n * top_k).indices
                        hits[f"{name}, x{n}"][at].append(recall(expected, layers[at].index))
    return {"chance": top_k / model.config.num_experts, **{name: _means(own) for name, own in sorted(hits.items())}}


def _means(by_layer: Mapping[int, Sequence[Tensor]]) -> dict[str, float]:
    layers = {f"layer {i}": round(float(torch.cat([*hits]).mean()), 3) for i, hits in sorted(by_layer.items())}
    return {"mean": round(fmean(layers.values()), 3), **layers}


def held_out(cache: Path, n_windows: int, n_tokens: int) -> Iterator[tuple[str, list[list[int]]]]:
    """Yield windows of the held-out text of each domain."""
    text = corpus.load(cache)
    tokenizer = AutoTokenizer.from_pretrained(DEMO, model_max_length=1 << 30)
    for domain in corpus.DOMAINS:
        ids = tokenizer(corpus.text_of(text.held_out, domain))["input_ids"]
        starts = random.Random(0).sample(range(len(ids) - n_tokens), n_windows)
        yield domain, [ids[start : start + n_tokens] for start in starts]


def costs(model: Any, lookahead: Lookahead, n_rows: int) -> dict[str, float]:
    """Return the microseconds of asking the next router, and of a layer from its experts to the next one's call."""
    rows = torch.randn(n_rows, model.config.hidden_size, dtype=model.dtype)
    asked: list[float] = []
    dense: list[float] = []
    left = [0.0]

    def at(call: seam.ExpertsCall) -> Tensor:
        if call.layer:
            dense.append(perf_counter() - left[0])
        output = torch.zeros_like(call.hidden)
        left[0] = perf_counter()
        return output

    for _ in range(60):
        drive(model, torch.ones(1, n_rows, dtype=torch.long), at)
        asked += (_seconds(partial(lookahead.expects, 0, rows)) for _ in range(5))
    return {"look_ahead_us": round(median(asked) * 1e6, 1), "dense_part_us": round(median(dense) * 1e6, 1)}


def _seconds(call: Callable[[], object]) -> float:
    started = perf_counter()
    call()
    return perf_counter() - started


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command("lookahead", __doc__)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="of the demo model's text")
    parser.add_argument("--windows", type=int, default=8, help="of each domain")
    parser.add_argument("--tokens", type=int, default=256, help="of each window")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with torch.inference_mode():
        loaded = adopt(AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.bfloat16).eval())
        seam.bind(loaded.experts, lambda *_: torch.empty(0))
        model, lookahead = loaded.model, Lookahead(loaded.model, loaded.experts)
        texts = {
            domain: [record(model, lookahead, ids) for ids in windows]
            for domain, windows in held_out(options.cache, options.windows, options.tokens)
        }
        found = {"recall": measure(model, texts), "demo_us": {n: costs(model, lookahead, n) for n in (1, 64)}}
    n_tokens = {domain: sum(len(window[0].index) for window in windows) for domain, windows in texts.items()}
    report = result("lookahead", machine.describe(), virtual=False, n_tokens=n_tokens, **found)
    recalls = [(name, f"{own['mean']:.3f}") for name, own in found["recall"].items() if name != "chance"]
    asked = [(f"{n}", f"{own['look_ahead_us']}", f"{own['dense_part_us']}") for n, own in found["demo_us"].items()]
    costs_table = table("Microseconds", ("rows", "to ask", "a layer's dense part"), asked)
    finish(options, report, table("Visits known a layer early", ("by", "share"), recalls), costs_table)


if __name__ == "__main__":
    main()
