"""What transformers says through a mask: read as it means it, or left to transformers; never dropped."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import anyio
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, masking_utils
from transformers.models.olmoe import modeling_olmoe

import fiddler
from fiddler import Engine, EngineConfig, UnsupportedModelError
from fiddler.cli.facts import read_facts
from fiddler.models import attention, masks
from fiddler.models.attention import CapturedCache, StaticInputs
from fiddler.models.kv import KvArena
from fiddler.models.loaded import load
from fiddler.models.masks import Sight
from tests.architectures import build
from tests.support.tiny import save_tiny
from tests.test_exactness import Save, eager

NO_PADDING = torch.zeros(1, dtype=torch.int64)
SIZES = st.integers(1, 12)
PROMPT = [*range(10, 40)]
N_NEW = 12


@st.composite
def functions(draw: st.DrawFn) -> masks.MaskFunction:
    """Causal, with any limits on top, in the ways in which transformers and its users compose them."""
    made: Any = masking_utils.causal_mask_function
    for _ in range(draw(st.integers(0, 3))):
        window, both = masking_utils.sliding_window_overlay(draw(SIZES)), draw(st.booleans())
        made = masking_utils.and_masks(window, made) if both else masking_utils.and_masks(made, window)
    if draw(st.booleans()):
        made = masking_utils.and_masks(masking_utils.chunked_overlay(draw(SIZES), NO_PADDING), made)
    return made  # type: ignore[no-any-return]


@given(function=functions(), n_rows=st.integers(1, 9), n_past=st.integers(0, 15))
def test_a_description_shows_what_the_mask_shows(function: masks.MaskFunction, n_rows: int, n_past: int) -> None:
    n_tokens = n_past + n_rows
    theirs: Any = masking_utils.sdpa_mask(
        1, n_rows, n_tokens, n_past, mask_function=function, allow_is_causal_skip=False
    )
    sight = masks.sight(masks.mask(mask_function=function))
    ours = sight.sees(torch.arange(n_past, n_tokens)[:, None], torch.arange(n_tokens)[None])
    assert torch.equal(ours, theirs[0, 0])
    assert sight.hidden(n_tokens) == int((~theirs[0, 0, -1]).sum())


@pytest.mark.parametrize("sight", [Sight(), Sight(window=3), Sight(chunk=4), Sight(window=3, chunk=4)])
def test_a_recorded_step_sees_the_same(sight: Sight) -> None:
    lengths = torch.tensor([1, 4, 5, 9])
    cache = CapturedCache(KvArena(9), StaticInputs(torch.stack([lengths] * 4)), 9)
    for length, row in zip(lengths.tolist(), cache.visible(sight), strict=True):
        expected = sight.sees(torch.tensor([length - 1]), torch.arange(9))
        assert torch.equal(row.flatten(), expected)


def config(**options: Any) -> MixtralConfig:
    made = MixtralConfig(**options)
    made._attn_implementation = attention.NAME
    return made


def edit_config(folder: Path, changes: dict[str, Any]) -> None:
    """Change options of a checkpoint; `None` takes one out."""
    file = folder / "config.json"
    changed = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))


def odd(batch: Any, head: Any, row: Any, other: Any) -> Any:
    return other % 2 == row % 2


CREATE = {
    "causal": masking_utils.create_causal_mask,
    "sliding": masking_utils.create_sliding_window_causal_mask,
    "chunked": masking_utils.create_chunked_causal_mask,
}


@pytest.mark.parametrize(
    ("create", "options", "arguments", "named"),
    [
        ("causal", {}, {"or_mask_function": odd}, "shows later tokens (or_masks;"),
        ("causal", {}, {"and_mask_function": odd}, "a mask of odd"),
        ("causal", {}, {"block_sequence_ids": torch.zeros(1, 3, dtype=torch.int64)}, "later tokens (or_masks;"),
        ("causal", {}, {"attention_mask": torch.tensor([[0, 1, 1]])}, "a mask of padding"),
        ("causal", {"is_causal": False}, {}, "is_causal"),
        ("sliding", {"sliding_window": 4, "is_causal": False}, {}, "is_causal"),
        ("sliding", {"sliding_window": 0}, {}, "sliding_window=0"),
        ("chunked", {"attention_chunk_size": 0}, {}, "attention_chunk_size=0"),
        (
            "chunked",
            {"attention_chunk_size": 4},
            {"and_mask_function": masking_utils.chunked_overlay(6, NO_PADDING)},
            "attention_chunk_size=4 and attention_chunk_size=6",
        ),
    ],
)
def test_what_has_no_description_is_refused_by_the_layer_that_attends_by_it(
    create: str, options: dict[str, Any], arguments: dict[str, Any], named: str
) -> None:
    make: Callable[..., Any] = CREATE[create]
    made = make(config(**options), torch.zeros(1, 3, 1), arguments.pop("attention_mask", None), None, **arguments)
    assert isinstance(made, Sight)
    with pytest.raises(UnsupportedModelError) as refusal:
        masks.sight(made)
    assert named in str(refusal.value)


@pytest.mark.parametrize("mask", [None, torch.zeros(1, 1, 3, 3)])
def test_a_mask_that_a_model_makes_itself_is_refused(mask: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="makes itself"):
        masks.sight(mask)


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("gpt_oss", {"sliding_window": 0}, "sliding_window=0"),
        # A layer attends in a way for which the model then makes no mask.
        ("gpt_oss", {"layer_types": ["chunked_attention"] * 3}, "cannot run as config.json describes it"),
    ],
)
def test_a_checkpoint_that_transformers_cannot_run_is_refused_when_it_is_opened(
    kind: str, changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "tiny", kind)
    edit_config(folder, changes)
    with pytest.raises(UnsupportedModelError, match=named):
        load(folder, EngineConfig())


@pytest.mark.parametrize(
    ("name", "changes", "packed"),
    [
        ("qwen2_moe", {"use_sliding_window": True, "max_window_layers": 1, "layer_types": None}, True),
        ("qwen2_moe", {"use_sliding_window": True, "max_window_layers": 4, "layer_types": None}, True),
        ("qwen2_moe", {"use_sliding_window": False}, True),
        ("qwen3_moe", {"use_sliding_window": True}, True),
        ("phimoe", {}, True),
        ("mixtral", {}, True),
        # No mask of theirs knows the option; the cache that `generate` makes for them does.
        ("olmoe", {}, False),
        ("olmoe", {"sliding_window": None, "attention_chunk_size": 8}, False),
        ("mixtral", {"sliding_window": 1}, False),  # and then that cache keeps everything
    ],
)
def test_windows_are_those_of_eager_generate(name: str, changes: dict[str, Any], packed: bool, save: Save) -> None:
    folder = save(build(name))
    edit_config(folder, {"sliding_window": 8, **changes})
    assert load(folder, EngineConfig()).packed == packed
    assert anyio.run(generated, folder) == expected(folder)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen3_moe", {"is_causal": False}),
        ("mixtral", {"is_causal": False, "sliding_window": 8}),
        ("gpt_oss", {"is_causal": False}),
        ("deepseek_v3", {"is_causal": False}),
        ("gemma4", {"use_bidirectional_attention": "all"}),
    ],
)
def test_a_prompt_that_sees_later_tokens_is_that_of_eager_generate(
    name: str, changes: dict[str, Any], save: Save
) -> None:
    folder = save(build(name))
    causal = expected(folder)
    edit_config(folder, changes)
    wanted = expected(folder)
    assert wanted != causal
    assert not load(folder, EngineConfig()).packed
    assert not read_facts(folder, trust_remote_code=False).packed
    assert anyio.run(generated, folder) == wanted
    assert eager(fiddler.attach(folder), PROMPT, N_NEW)[0] == wanted


def test_a_multimodal_checkpoint_without_its_towers_may_see_later_tokens(save: Save) -> None:
    folder = save(build("gemma4_multimodal"))
    config = json.loads((folder / "config.json").read_text())
    edit_config(folder, {"text_config": {**config["text_config"], "use_bidirectional_attention": "all"}})
    wanted = anyio.run(generated, folder)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "vision" not in name}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    assert anyio.run(generated, folder) == wanted


def test_own_forwards_that_transformers_cannot_run_are_refused_when_opened(save: Save) -> None:
    folder = save(build("qwen3_next"))
    edit_config(
        folder, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 3.0}}
    )
    with pytest.raises(
        UnsupportedModelError, match=r"'qwen3_next' cannot run as config.json describes it: \w+Error"
    ):
        load(folder, EngineConfig())


@pytest.mark.parametrize(("name", "way"), [("gpt_oss", "_explicit"), ("mixtral", "_fused")])
def test_what_a_window_hides_is_not_computed_with(
    name: str, way: str, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend, read = getattr(attention, way), list[int]()

    def listening(q: torch.Tensor, k: torch.Tensor, *rest: Any) -> torch.Tensor:
        read.append(k.shape[2] - q.shape[2] + 1)
        return cast("torch.Tensor", attend(q, k, *rest))

    folder = save(build(name))
    edit_config(folder, {"sliding_window": 8, "layer_types": None})
    wanted = expected(folder)
    monkeypatch.setattr(attention, way, listening)
    assert anyio.run(generated, folder) == wanted
    within = sum(n <= 8 for n in read)
    assert within >= len(read) // 2  # every second layer, at least
    assert max(read) <= (8 if name == "mixtral" else len(PROMPT) + N_NEW)


def test_chunks_are_those_of_eager_generate(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    """As no architecture that shares steps is cut so today, one is made to be."""
    monkeypatch.setattr(modeling_olmoe, "create_causal_mask", masking_utils.create_chunked_causal_mask)
    folder = save(build("olmoe"))
    edit_config(folder, {"attention_chunk_size": 8})
    assert load(folder, EngineConfig()).packed
    assert anyio.run(generated, folder) == expected(folder)


def expected(folder: Path) -> list[int]:
    reference = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    return eager(reference, PROMPT, N_NEW)[0]


async def generated(folder: Path) -> list[int]:
    async with Engine(folder, EngineConfig(chunk_tokens=7)) as engine:
        return list((await engine.generate(PROMPT, max_new_tokens=N_NEW)).token_ids)
