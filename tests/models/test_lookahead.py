"""The next layer's experts are known a layer early, and asking for them leaves no trace in the forward."""

import gc
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from fiddler.models import seam
from fiddler.models.loaded import adopt
from fiddler.models.lookahead import Lookahead
from tests.architectures import build, included

# Their experts get other rows than their routers, or the block is the whole decoder layer, or text and vision
# experts take turns.
UNASKED = frozenset({"ernie4_5_vl_moe", "gemma4", "gemma4_multimodal", "muse_spark"})
IDS = torch.arange(1, 13)[None]

Ahead = Callable[[int, Tensor], Tensor | None]
Change = Callable[[nn.Module, Tensor], AbstractContextManager[Any] | None]


class Run(NamedTuple):
    """A forward of `IDS`: its logits, and by layer the rows and what was expected of the next layer."""

    logits: Tensor
    hidden: dict[int, Tensor]
    expected: dict[int, Tensor | None]


def run(model: PreTrainedModel, ahead: Ahead | None = None) -> Run:
    experts = list(seam.find_experts(model).values())
    hidden: dict[int, Tensor] = {}
    expected: dict[int, Tensor | None] = {}
    with torch.inference_mode():
        forward = seam.Forward(lambda: model(IDS, use_cache=False).logits)
        result = forward.send()
        while not forward.dead:
            layer, rows, index, weights = result
            hidden[layer] = rows.clone()
            expected[layer] = None if ahead is None else ahead(layer, rows)
            module = experts[layer]
            result = forward.send(type(module).forward.__wrapped__(module, rows, index, weights))
    return Run(result, hidden, expected)


def opened(name: str) -> tuple[PreTrainedModel, Lookahead]:
    loaded = adopt(build(name))
    seam.bind(loaded.experts, _no_experts)
    return loaded.model, Lookahead(loaded.model, loaded.experts)


def _no_experts(*_: Any) -> Tensor:
    raise AssertionError("an expert ran ahead")


def linear(config: Any, router: Any, rows: Tensor) -> Tensor:
    logits = F.linear(rows, router.weight, getattr(router, "bias", None))
    return logits.topk(config.num_experts_per_tok).indices


def grouped(config: Any, router: Any, rows: Tensor) -> Tensor:
    """DeepSeek-V3 (arXiv:2412.19437): the best groups by the sum of their two best, then the best of these."""
    scores = F.linear(rows, router.weight).sigmoid() + router.e_score_correction_bias
    groups = scores.view(len(rows), config.n_group, -1)
    kept = groups.topk(2).values.sum(-1).topk(config.topk_group).indices
    mask = torch.zeros(groups.shape[:2]).scatter(1, kept, 1.0)[..., None].expand_as(groups)
    allowed: Tensor = scores.masked_fill(mask.reshape_as(scores) == 0, -torch.inf)
    return allowed.topk(config.num_experts_per_tok).indices


@pytest.mark.parametrize(
    ("name", "place", "by_hand"),
    [
        ("qwen3_moe", "gate", linear),
        ("mixtral", "gate", linear),
        ("gpt_oss", "router", linear),
        ("deepseek_v3", "gate", grouped),
    ],
)
def test_it_is_what_the_next_router_picks(name: str, place: str, by_hand: Callable[..., Tensor]) -> None:
    model, lookahead = opened(name)
    paths = list(seam.find_experts(model))
    for _ in range(2):  # learning how to ask, and asking
        made = run(model, lookahead.expects)
        for layer, path in enumerate(paths[1:]):
            router = model.get_submodule(path.replace("experts", place))
            expected = made.expected[layer]
            assert expected is not None
            with torch.inference_mode():
                picked = by_hand(model.config, router, made.hidden[layer])
            assert torch.equal(expected.sort().values, picked.sort().values)
        assert made.expected[len(paths) - 1] is None


def torch_modes() -> tuple[bool, bool, bool]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("name", included())
def test_asking_leaves_no_trace(name: str) -> None:
    model, lookahead = opened(name)
    alone = run(model)
    state = {key: value.clone() for key, value in (*model.named_parameters(), *model.named_buffers())}
    noise, modes = torch.get_rng_state(), torch_modes()
    for _ in range(2):
        made = run(model, lookahead.expects)
        assert torch.equal(made.logits, alone.logits)
        assert all(torch.equal(value, alone.hidden[layer]) for layer, value in made.hidden.items())
    assert torch_modes() == modes
    assert torch.equal(torch.get_rng_state(), noise)
    now = dict((*model.named_parameters(), *model.named_buffers()))
    assert now.keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in now.items())
    assert not any(module._forward_hooks for module in model.modules())
    *before, last = made.expected.values()
    assert last is None
    assert all((expected is None) == (name in UNASKED) for expected in before)


def block_of(model: PreTrainedModel, layer: int) -> nn.Module:
    block: nn.Module = model.get_submodule(list(seam.find_experts(model))[layer].rpartition(".")[0])
    return block


def asked_ahead(model: PreTrainedModel, lookahead: Lookahead, block: Any, change: Change) -> tuple[Run, Run]:
    """Let a block do `change` when it is asked ahead; a run without asking, and one where it was asked before."""
    forward = block.forward
    asking = False

    def changed(hidden: Tensor) -> Tensor:
        if asking:
            with change(block, hidden) or nullcontext():
                return cast("Tensor", forward(hidden))
        return cast("Tensor", forward(hidden))

    def ahead(layer: int, hidden: Tensor) -> Tensor | None:
        nonlocal asking
        asking = True
        index = lookahead.expects(layer, hidden)
        asking = False
        return index

    alone = run(model)
    block.forward = changed
    run(model, ahead)
    return alone, run(model, ahead)


def fail(block: nn.Module, hidden: Tensor) -> None:
    raise RuntimeError("not like this")


def count(block: Any, hidden: Tensor) -> None:
    block.n_calls = getattr(block, "n_calls", 0) + 1


def train(block: Any, hidden: Tensor) -> None:
    block.gate.e_score_correction_bias.add_(1.0)


def swap(block: Any, hidden: Tensor) -> None:
    block.gate.e_score_correction_bias = torch.zeros(8)


def scale(block: nn.Module, hidden: Tensor) -> None:
    hidden.mul_(2.0)


def hold(block: nn.Module, hidden: Tensor) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("change", [fail, count, train, swap, scale, hold])
def test_a_block_that_does_not_bear_it_is_not_asked_again(change: Change) -> None:
    model, lookahead = opened("deepseek_v3")
    block = block_of(model, 2)
    noise, modes = torch.get_rng_state(), torch_modes()
    alone, again = asked_ahead(model, lookahead, block, change)
    assert torch.equal(again.logits, alone.logits)
    assert torch.equal(torch.get_rng_state(), noise)
    assert torch_modes() == modes
    assert not hasattr(block, "n_calls")
    assert again.expected[0] is not None  # the others still are
    assert again.expected[1] is None


def test_what_others_draw_meanwhile_stays_drawn() -> None:
    """Put back, the generator of the process would give another thread its numbers twice."""
    model, lookahead = opened("mixtral")
    torch.manual_seed(0)
    expected = torch.rand(3)

    def draw(block: nn.Module, hidden: Tensor) -> None:
        thread = threading.Thread(target=lambda: drawn.append(torch.rand(1)))
        thread.start()
        thread.join()

    drawn: list[Tensor] = []
    torch.manual_seed(0)
    _, again = asked_ahead(model, lookahead, block_of(model, 1), draw)
    assert again.expected[0] is not None
    assert torch.equal(torch.cat(drawn), expected[: len(drawn)])
    assert torch.equal(torch.rand(1), expected[len(drawn)][None])


def test_a_block_that_asks_for_no_experts_is_not_asked_again() -> None:
    model, lookahead = opened("mixtral")
    block: Any = block_of(model, 1)
    alone = run(model)
    forward, block.forward = block.forward, lambda hidden: hidden
    with torch.inference_mode():
        assert lookahead.expects(0, alone.hidden[0]) is None
    block.forward = forward
    assert run(model, lookahead.expects).expected[0] is None


@pytest.mark.parametrize("name", ["deepseek_v3", "mixtral"])
def test_the_heaviest_come_first(name: str) -> None:
    model, lookahead = opened(name)
    made = run(model, lookahead.expects)
    with torch.inference_mode():
        _, weights, index = block_of(model, 1).get_submodule("gate")(made.hidden[0])
    assert made.expected[0] is not None
    assert torch.equal(made.expected[0], index.gather(1, weights.argsort(descending=True)))


def test_shared_experts_run_ahead_once_and_never_again() -> None:
    model, lookahead = opened("qwen2_moe")
    n_calls = 0

    def shared(*_: Any) -> None:
        nonlocal n_calls
        n_calls += 1

    block_of(model, 1).get_submodule("shared_expert").register_forward_hook(shared)
    for _ in range(3):
        assert run(model, lookahead.expects).expected[0] is not None
    assert n_calls == 3 + 1


def test_a_block_that_chooses_by_itself_is_asked_as_a_whole() -> None:
    model, lookahead = opened("mixtral")
    block: Any = block_of(model, 1)

    def by_itself(hidden: Tensor) -> Tensor:
        rows = hidden.flatten(0, 1)
        _, weights, index = block.gate(rows)
        return cast("Tensor", block.experts(rows, index.clone(), weights).view_as(hidden))

    expected = run(model, lookahead.expects).expected[0]
    model, lookahead = opened("mixtral")
    block = block_of(model, 1)
    block.forward = by_itself
    for _ in range(2):
        again = run(model, lookahead.expects).expected[0]
        assert expected is not None
        assert again is not None
        assert torch.equal(again, expected)


def test_it_keeps_none_of_the_rows() -> None:
    model, lookahead = opened("minimax_m2")
    kept: list[weakref.ref[Tensor]] = []

    def note(_: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        kept.extend(map(weakref.ref, (args[0], *output)))

    block_of(model, 1).get_submodule("gate").register_forward_hook(note)
    with torch.inference_mode():
        assert lookahead.expects(0, torch.rand(3, 64)) is not None
    gc.collect()
    assert kept
    assert [tensor() for tensor in kept] == [None] * len(kept)
