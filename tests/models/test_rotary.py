"""Embeddings that depend on the length of a sequence: each request is rotated as if it were alone.

Prompts lie on both sides of a limit of 24 tokens, and requests cross it while they decode.
"""

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import anyio
import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import fiddler
from fiddler import Engine, EngineConfig, UnsupportedModelError
from fiddler.models.loaded import load
from fiddler.models.rotary import find_rotary, starts_over
from fiddler.models.sampling import Sampler
from tests.architectures import architectures, build
from tests.architectures.config import tiny_config
from tests.support.fake_gpu import FakeGpu
from tests.support.placement import Placement, Script, Subject, Visit, run

Save = Callable[[PreTrainedModel], Path]

LIMIT = 24
N_PROMPT = (30, 5, LIMIT, 20, LIMIT + 1)
N_NEW = (5, 23, 4, 7, 2)
CONFIG = EngineConfig(chunk_tokens=8, max_running=4)
CASES = [
    *[("phimoe", kind) for kind in ("longrope", "dynamic", "linear", "yarn")],
    *[("qwen3_moe", kind) for kind in ("longrope", "dynamic", "llama3")],
    ("mixtral", "longrope"),
    ("deepseek_v2", "dynamic"),  # angles as complex numbers, and latent keys
    ("laguna", "mixed"),  # embeddings of their own for layers of each type
    ("qwen3_vl_moe", "longrope"),  # positions with three axes
    ("qwen3_next", "dynamic"),  # not packed: what is kept between forwards is all there is to see
]


def rotated(name: str, kind: str) -> PreTrainedModel:
    """Architecture `name`, tiny, with embeddings of a kind; the same weights for each."""
    architecture = architectures()[name]
    config = tiny_config(architecture.package, architecture.model_class())
    text = config.get_text_config()
    text.head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    text.max_position_embeddings = LIMIT if kind in {"dynamic", "mixed"} else 4 * LIMIT
    if kind == "mixed":
        assert isinstance(text.rope_parameters["full_attention"], dict)
        text.rope_parameters = {
            "full_attention": parameters("dynamic", text.rope_parameters["full_attention"], text.head_dim),
            "sliding_attention": parameters("linear", text.rope_parameters["sliding_attention"], text.head_dim),
        }
    else:
        text.rope_parameters = parameters(kind, text.rope_parameters, text.head_dim)
    if name == "phimoe":
        text.rope_parameters |= {"short_mscale": 1.1, "long_mscale": 1.5, "original_max_position_embeddings": LIMIT}
        text.original_max_position_embeddings = LIMIT
    plain = build(name)
    model = architecture.model_class()(config)
    model.load_state_dict(plain.state_dict())
    model.generation_config = plain.generation_config
    return model.eval()


def parameters(kind: str, before: dict[str, Any], head_dim: int) -> dict[str, Any]:
    kept = {
        name: before[name] for name in ("partial_rotary_factor", "mrope_section", "rope_theta") if name in before
    }
    made = {"rope_type": kind, "factor": 4.0, **kept}
    if kind != "linear" and kind != "dynamic":
        made["original_max_position_embeddings"] = LIMIT
    if kind == "longrope":
        n, random = int(head_dim * kept.get("partial_rotary_factor", 1.0)) // 2, Random(1)
        made["short_factor"] = [1 + random.random() for _ in range(n)]
        made["long_factor"] = [2 + 8 * random.random() for _ in range(n)]
    if kind == "llama3":
        made |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return made


def prompts() -> list[list[int]]:
    random = torch.Generator().manual_seed(1)
    return [torch.randint(1, 190, (n,), generator=random).tolist() for n in N_PROMPT]


def alone(model: PreTrainedModel, prompt: list[int], n_new: int, **options: Any) -> tuple[list[int], Tensor]:
    """Return token ids, and the logits `[n_new, V]` they were picked from."""
    made = model.generate(
        torch.tensor([prompt]), max_new_tokens=n_new, output_logits=True, return_dict_in_generate=True, **options
    )
    return made.sequences[0, len(prompt) :].tolist(), torch.cat(made.logits)


def expected(name: str, kind: str, prompt: list[int], n_new: int) -> tuple[list[int], Tensor]:
    """What a model that has seen nothing else makes.

    Where `generate` starts over it does what it would without a cache; some versions then forget the tokens before.
    """
    return alone(rotated(name, kind), prompt, n_new, use_cache=name != "phimoe")


class Listening:
    """Logits that tokens are picked from, by the length of the prompt."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.logits: dict[int, list[Tensor]] = {n: [] for n in N_PROMPT}
        pick = Sampler.pick

        def picking(sampler: Sampler, logits: Tensor, context: Any) -> tuple[int, float | None]:
            asked = next(prompt for prompt in prompts() if list(context[: len(prompt)]) == prompt)
            self.logits[len(asked)].append(logits.clone())
            return pick(sampler, logits, context)

        monkeypatch.setattr(Sampler, "pick", picking)


async def made_together(engine: Engine) -> dict[int, tuple[int, ...]]:
    """Return the tokens of all prompts, asked for at once, by the length of the prompt."""
    made: dict[int, tuple[int, ...]] = {}

    async def ask(prompt: list[int], n_new: int) -> None:
        made[len(prompt)] = (await engine.generate(prompt, max_new_tokens=n_new)).token_ids

    async with anyio.create_task_group() as group:
        for prompt, n_new in zip(prompts(), N_NEW, strict=True):
            group.start_soon(ask, prompt, n_new)
    return made


def asked_together(folder: Path, config: EngineConfig) -> dict[int, tuple[int, ...]]:
    """Return what an engine of its own makes of all prompts."""

    async def main() -> dict[int, tuple[int, ...]]:
        async with Engine(folder, config) as engine:
            return await made_together(engine)

    return anyio.run(main)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_each_request_is_rotated_as_it_is_alone(
    name: str, kind: str, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [expected(name, kind, *asked) for asked in zip(prompts(), N_NEW, strict=True)]
    heard = Listening(monkeypatch)
    made = asked_together(save(rotated(name, kind)), CONFIG)
    for n_prompt, (tokens, logits) in zip(N_PROMPT, wanted, strict=True):
        assert list(made[n_prompt]) == tokens
        torch.testing.assert_close(torch.stack(heard.logits[n_prompt]), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.anyio
async def test_a_request_crosses_the_limit_beside_others(save: Save) -> None:
    async with Engine(save(rotated("phimoe", "longrope")), CONFIG) as engine:
        made = await made_together(engine)
    wanted = expected("phimoe", "longrope", prompts()[1], N_NEW[1])[0]
    assert list(made[N_PROMPT[1]]) == wanted


@pytest.mark.parametrize(("name", "kind"), [("phimoe", "longrope"), ("qwen3_moe", "dynamic")])
@pytest.mark.parametrize(
    "options",
    [{"waves": "two"}, {"device": "sim:rtx4090-desktop", "slots": 9, "waves": "two"}, {"store": "packed"}],
    ids=["two-waves", "sim", "store"],
)
def test_wherever_experts_run(name: str, kind: str, options: dict[str, Any], save: Save) -> None:
    wanted = {len(p): tuple(expected(name, kind, p, n)[0]) for p, n in zip(prompts(), N_NEW, strict=True)}
    assert asked_together(save(rotated(name, kind)), EngineConfig(chunk_tokens=8, **options)) == wanted


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_next"])
def test_a_long_request_leaves_nothing_for_the_next(name: str, save: Save) -> None:
    model = rotated(name, "dynamic")
    folder, (long, short, *_) = save(model), prompts()

    async def main() -> list[tuple[int, ...]]:
        async with Engine(folder, CONFIG) as engine:
            return [(await engine.generate(prompt, max_new_tokens=22)).token_ids for prompt in (long, short, long)]

    first, second, third = anyio.run(main)
    assert list(second) == expected(name, "dynamic", short, 22)[0]
    assert first == third


def test_crossing_is_what_generate_does(save: Save) -> None:
    model = rotated("phimoe", "longrope")
    inputs = model.prepare_inputs_for_generation(
        torch.ones(1, LIMIT + 1, dtype=torch.int64), past_key_values=model(torch.ones(1, LIMIT).long())[1],
        next_sequence_length=1,
    )  # fmt: skip
    if inputs["input_ids"].shape[1] == 1:
        pytest.skip(f"transformers {transformers.__version__} starts over without the tokens before")
    for prompt, n_new in zip(prompts(), N_NEW, strict=True):
        assert alone(model, prompt, n_new)[0] == expected("phimoe", "longrope", prompt, n_new)[0]


@pytest.mark.parametrize(("name", "forgets"), [("phimoe", True), ("qwen3_moe", False)])
def test_a_past_is_forgotten_where_generate_forgets_it(name: str, forgets: bool) -> None:
    model = rotated(name, "longrope")
    assert [n for n in (1, LIMIT - 1, LIMIT, LIMIT + 1, 40) if starts_over(model, n)] == [LIMIT] * forgets


def test_a_request_that_starts_over_is_counted_and_recorded_once(save: Save) -> None:
    folder, (_, prompt, *_) = save(rotated("phimoe", "longrope")), prompts()

    async def main() -> tuple[Any, Any]:
        async with Engine(folder, EngineConfig(chunk_tokens=8, record=True)) as engine:
            made = await engine.generate(prompt, max_new_tokens=23)
            counted = engine.statistics()
            await engine.generate([*prompt, *made.token_ids[:-1]], max_new_tokens=1)
            assert engine.statistics().n_kv_tokens == 0
        return counted, engine.routing()

    counted, routing = anyio.run(main)
    assert (counted.n_prompt_tokens, counted.n_new_tokens) == (5, 23)
    crossing, whole = routing.recordings
    assert (crossing.n_prompt, len(crossing.experts)) == (5, 27)
    assert np.array_equal(crossing.experts, whole.experts)


@pytest.mark.parametrize(("name", "kind"), [("mixtral", "longrope"), ("qwen3_moe", "dynamic")])
def test_plain_transformers_is_left_as_it_is(name: str, kind: str, save: Save) -> None:
    model = fiddler.attach(save(rotated(name, kind)))
    prompt = prompts()[1]
    assert alone(model, prompt, 23)[0] == expected(name, kind, prompt, 23)[0]
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("kind", "max_context"),
    [("llama3", None), ("linear", None), ("yarn", None), ("longrope", LIMIT), ("dynamic", LIMIT)],
)
def test_where_no_length_matters_nothing_is_paid(kind: str, max_context: int | None, save: Save) -> None:
    loaded = load(save(rotated("qwen3_moe", kind)), EngineConfig(max_context=max_context))
    assert loaded.rotary is None
    assert not any("forward" in vars(module) for module in loaded.model.modules())


def test_an_embedding_that_cannot_say_how_it_depends_is_named() -> None:
    model = rotated("qwen3_moe", "longrope")
    del model.config.rope_parameters["long_factor"]
    with pytest.raises(UnsupportedModelError, match=r"Qwen3MoeRotaryEmbedding.*'long_factor'.*rope_parameters"):
        find_rotary(model, 4 * LIMIT)


def test_dynamic_ntk_stretches_the_context(save: Save) -> None:
    assert load(save(rotated("qwen3_moe", "dynamic")), EngineConfig()).resolved.max_context == 4 * LIMIT


def test_no_graph_is_recorded(tmp_path: Path) -> None:
    rotated("qwen3_moe", "longrope").save_pretrained(tmp_path)
    subject = Subject.open(tmp_path)
    visits = [Visit(tuple(prompt), n, 0, 1000) for prompt, n in zip(prompts(), (20, 3, 9, 4, 25), strict=True)]
    script = Script(tuple(visits), chunk_tokens=16)
    plain = run(subject, script, Placement(EngineConfig(waves="one")))
    gpu = FakeGpu(3)
    config = EngineConfig(device="cuda", slots=7, graphs=True, waves="one")
    played = run(subject, script, Placement(config, gpu=gpu))
    for at, logits in plain.logits.items():
        torch.testing.assert_close(played.logits[at], logits, rtol=1e-4, atol=1e-4)
    assert gpu.n_graphs == 0
    assert played.rig.steps.graphs is not None
    assert "lengths of their sequences" in played.rig.steps.graphs.why_not
