"""How often the next layer's experts are known a layer early, and what it costs to ask.

    python -m bench.lookahead [--cache DIR] [--windows 8] [--tokens 256]

Recall is the share of the next layer's visits that are among the experts expected one layer before. It is measured
with the demo model on the text held out of its training (fetched, and kept in the cache folder), beside what
needs no router: the experts of the token before, and which experts of the next layer followed those of this one in
the other domains. The look-ahead is what `fiddler.models.lookahead` does; the variants feed the next router
something else. All numbers go to standard output as JSON.
"""

import json
import random
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3Config, Qwen2MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from bench import machine
from bench.report import result
from fiddler import DEMO
from fiddler.models import lookahead as asking
from fiddler.models import seam
from fiddler.models.loaded import adopt
from fiddler.models.lookahead import Lookahead
from tests.architectures import build, included
from tools.demo import corpus
from tools.demo.__main__ import DEFAULT_CACHE

QWEN = Qwen2MoeConfig(
    hidden_size=2048, moe_intermediate_size=1408, shared_expert_intermediate_size=5632, num_experts=60
)
DEEPSEEK = DeepseekV3Config()
QWEN._experts_implementation = DEEPSEEK._experts_implementation = seam.NAME
BLOCKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "qwen1.5-moe-a2.7b (shared expert first)": (partial(Qwen2MoeSparseMoeBlock, QWEN), QWEN.hidden_size),
    "deepseek-v3 (shared expert last)": (partial(DeepseekV3MoE, DEEPSEEK), DEEPSEEK.hidden_size),
}
"""Blocks of published size, and their hidden size."""


@dataclass(slots=True)
class Layer:
    """What passed one MoE layer in a forward, a row a token."""

    residual: Tensor
    """`[T, H]`, before the norm whose output the router gets."""
    hidden: Tensor
    index: Tensor
    weights: Tensor
    output: Tensor
    """`[T, H]`, of the experts."""
    ahead: Tensor | None
    """`[T, K]`, the next layer's experts as expected."""


def drive(model: Any, ids: Tensor, at: Callable[[seam.ExpertsCall], Tensor]) -> None:
    """Run one forward, its experts by `at`."""
    forward = seam.Forward(lambda: model(ids, use_cache=False))
    result = forward.send()
    while not forward.dead:
        result = forward.send(at(result))


def compute(module: Any, call: seam.ExpertsCall) -> Tensor:
    """Return the experts' output by transformers' own plain code."""
    output: Tensor = type(module).forward.__wrapped__(module, call.hidden, call.index, call.weights)
    return output


def record(model: Any, lookahead: Lookahead, ids: list[int]) -> list[Layer]:
    """Return what passed the layers of the demo model while it read `ids`."""
    residuals: list[Tensor] = []
    norms = [layer.post_attention_layernorm for layer in model.model.layers]
    hooks = [norm.register_forward_pre_hook(lambda _, args: residuals.append(args[0][0])) for norm in norms]
    experts = list(seam.find_experts(model).values())
    layers: list[Layer] = []

    def at(call: seam.ExpertsCall) -> Tensor:
        ahead = lookahead.expects(call.layer, call.hidden)
        output = compute(experts[call.layer], call)
        layers.append(Layer(residuals[-1], call.hidden, call.index, call.weights, output, ahead))
        return output

    drive(model, torch.tensor([ids]), at)
    for hook in hooks:
        hook.remove()
    return layers


def recall(expected: Tensor, picked: Tensor) -> Tensor:
    """Return which of the visits `[T, K]` were among the expected `[T, any]`, as `[T * K]`."""
    return (picked[:, :, None] == expected[:, None, :]).any(-1).float().flatten()


def variants(model: Any, layers: list[Layer], i: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the next router's logits `[T, E]` for what each variant feeds it."""
    now = layers[i]
    mine, norm = (model.model.layers[j].post_attention_layernorm for j in (i, i + 1))
    fed = {
        "1 hidden as the experts get it": now.hidden,
        "2 hidden / this norm's weight * the next one's": now.hidden / mine.weight * norm.weight,
        "3 residual through the next norm": norm(now.residual),
        "4 residual + experts' output through the next norm": norm(now.residual + now.output),
        "4b hidden + experts' output": now.hidden + now.output,
    }
    for name, rows in fed.items():
        yield name, F.linear(rows, model.model.layers[i + 1].mlp.gate.weight).float()
    if i + 2 < len(layers):
        yield "1, two layers ahead", F.linear(now.hidden, model.model.layers[i + 2].mlp.gate.weight).float()


def transitions(model: Any, texts: list[list[Layer]]) -> Tensor:
    """Return how often expert b of the next layer followed expert a, `[L - 1, E, E]`, as shares of a's visits."""
    n_layers, n_experts = model.config.num_hidden_layers, model.config.num_experts
    counts = torch.full((n_layers - 1, n_experts, n_experts), 1e-3)
    for layers in texts:
        for i in range(n_layers - 1):
            pairs = (layers[i].index[:, :, None] * n_experts + layers[i + 1].index[:, None, :]).flatten()
            counts[i] += torch.bincount(pairs, minlength=n_experts**2).view(n_experts, n_experts)
    return counts / counts.sum(-1, keepdim=True)


class Recalls(defaultdict[tuple[str, int], list[Tensor]]):
    """Hits by predictor and layer."""

    def summary(self) -> dict[str, Any]:
        """Return by predictor the mean of the layers, and each layer's."""
        found: dict[str, dict[str, float]] = defaultdict(dict)
        for (name, layer), hits in sorted(self.items()):
            found[name][f"layer {layer}"] = round(float(torch.cat(hits).mean()), 3)
        return {name: {"mean": round(fmean(layers.values()), 3), **layers} for name, layers in found.items()}


def measure(model: Any, texts: dict[str, list[list[Layer]]]) -> dict[str, Any]:
    """Return recall by predictor: with as many expected as picked (x1), and with twice as many (x2)."""
    recalls = Recalls(list)
    n_layers, top_k = model.config.num_hidden_layers, model.config.num_experts_per_tok
    for domain, windows in texts.items():
        others = transitions(model, [w for name, ws in texts.items() if name != domain for w in ws])
        for layers in windows:
            for i in range(n_layers - 1):
                now, following = layers[i], layers[i + 1]
                assert now.ahead is not None
                recalls["the look-ahead", i + 1].append(recall(now.ahead, following.index))
                for rank in range(top_k):
                    hits = recall(following.index, now.ahead[:, rank : rank + 1])
                    recalls[f"precision of the look-ahead's choice {rank + 1}", i + 1].append(hits)
                hits = recall(following.index[:-1], following.index[1:])
                recalls["the token before", i + 1].append(hits)
                scores = dict(variants(model, layers, i))
                scores["transitions, of other domains"] = others[i][now.index].sum(1)
                for name, score in scores.items():
                    at = i + 2 if "two layers" in name else i + 1
                    for n in (1, 2):
                        expected = score.topk(n * top_k).indices
                        recalls[f"{name}, x{n}", at].append(recall(expected, layers[at].index))
    return {"chance": top_k / model.config.num_experts, **recalls.summary()}


def held_out(cache: Path, n_windows: int, n_tokens: int) -> Iterator[tuple[str, list[list[int]]]]:
    """Yield windows of the held-out text of each domain."""
    text = corpus.load(cache)
    tokenizer = AutoTokenizer.from_pretrained(DEMO, model_max_length=1 << 30)
    for domain in corpus.DOMAINS:
        ids = tokenizer(corpus.text_of(text.held_out, domain))["input_ids"]
        starts = random.Random(0).sample(range(len(ids) - n_tokens), n_windows)
        yield domain, [ids[start : start + n_tokens] for start in starts]


def us(call: Callable[[], Any], n_times: int = 300) -> float:
    """Return the median time of a call in microseconds."""
    times = []
    for _ in range(n_times):
        started = perf_counter()
        call()
        times.append(perf_counter() - started)
    return round(median(times[n_times // 10 :]) * 1e6, 1)


def dense_us(model: Any, n_rows: int) -> float:
    """Return the time from one layer's experts to the next one's call: norms, attention and router."""
    times: list[float] = []
    left = [0.0]

    def at(call: seam.ExpertsCall) -> Tensor:
        if call.layer:
            times.append(perf_counter() - left[0])
        output = torch.zeros_like(call.hidden)
        left[0] = perf_counter()
        return output

    for _ in range(60):
        drive(model, torch.ones(1, n_rows, dtype=torch.long), at)
    return round(median(times) * 1e6, 1)


def demo_costs(model: Any, lookahead: Lookahead, n_rows: int) -> dict[str, float]:
    """Return what it costs to ask the demo model's next router, beside a layer's dense part."""
    rows = torch.randn(n_rows, model.config.hidden_size, dtype=model.dtype)
    learning = Lookahead(model, seam.find_experts(model))
    started = perf_counter()
    learning.expects(0, rows)
    return {
        "first_call_us": round((perf_counter() - started) * 1e6, 1),
        "look_ahead_us": us(partial(lookahead.expects, 0, rows)),
        "as_a_whole_block_us": us(partial(asking._ask_block, model.model.layers[1].mlp, rows)),
        "dense_part_us": dense_us(model, n_rows),
    }


def two_blocks(make: Callable[[], nn.Module]) -> Any:
    """Return two MoE blocks in bf16, without memory for their experts."""
    with torch.device("meta"):
        model: Any = nn.Module()
        model.layers = nn.ModuleList(make().bfloat16() for _ in range(2))
    for module in model.modules():
        if not seam.is_seamed(module):
            for name, parameter in module.named_parameters(recurse=False):
                drawn = torch.randn(parameter.shape).mul_(0.02).to(parameter.dtype)
                setattr(module, name, nn.Parameter(drawn, requires_grad=False))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype))
    return model


def block_costs(make: Callable[[], nn.Module], hidden_size: int, n_rows: int) -> dict[str, float]:
    """Return what it costs to ask a router alone, and with all that its block runs before the experts."""
    model = two_blocks(make)
    experts = seam.find_experts(model)
    seam.bind(experts, lambda *_: torch.empty(0))
    lookahead = Lookahead(model, experts)
    rows = torch.randn(n_rows, hidden_size, dtype=torch.bfloat16)
    assert lookahead.expects(0, rows) is not None
    return {
        "look_ahead_us": us(partial(lookahead.expects, 0, rows), 100),
        "as_a_whole_block_us": us(partial(asking._ask_block, model.layers[1], rows), 100),
    }


def architectures() -> dict[str, str]:
    """Return by architecture how its blocks can be asked, tiny and random: the router, the block, or not at all."""
    found = {}
    for name in included():
        loaded = adopt(build(name))
        experts = list(loaded.experts.values())
        lookahead = Lookahead(loaded.model, loaded.experts)
        seam.bind(loaded.experts, lambda *_: torch.empty(0))
        asked: list[bool] = []

        def at(call: seam.ExpertsCall, asked: list[bool] = asked, it: Any = (lookahead, experts)) -> Tensor:
            asked.append(it[0].expects(call.layer, call.hidden) is not None)
            return compute(it[1][call.layer], call)

        drive(loaded.model, torch.arange(1, 13)[None], at)
        whole = any(isinstance(ask, partial) for ask in lookahead._asks)
        found[name] = ("block" if whole else "router") if all(asked[:-1]) else "none"
    return found


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="of the demo model's text")
    parser.add_argument("--windows", type=int, default=8, help="of each domain")
    parser.add_argument("--tokens", type=int, default=256, help="of each window")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = result("lookahead", machine.describe(), virtual=False, n_tokens={})
    with torch.inference_mode():
        loaded = adopt(AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.bfloat16).eval())
        seam.bind(loaded.experts, lambda *_: torch.empty(0))
        model, lookahead = loaded.model, Lookahead(loaded.model, loaded.experts)
        texts = {}
        for domain, windows in held_out(options.cache, options.windows, options.tokens):
            texts[domain] = [record(model, lookahead, ids) for ids in windows]
            found["n_tokens"][domain] = sum(map(len, windows))
        found["recall"] = measure(model, texts)
        found["demo_us"] = {n_rows: demo_costs(model, lookahead, n_rows) for n_rows in (1, 64)}
        for name, (make, hidden_size) in BLOCKS.items():
            found[f"{name}, us"] = {n_rows: block_costs(make, hidden_size, n_rows) for n_rows in (1, 64)}
        found["architectures"] = architectures()
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
