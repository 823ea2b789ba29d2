"""Every architecture behind the seam, loaded from disk, says what transformers' eager forward says."""

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path

import anyio
import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import fiddler
from fiddler import Engine, EngineConfig
from fiddler.models.packing import PACKED
from fiddler.models.sampling import Sampler
from tests.architectures import architectures, build, excluded, included, stateful

Save = Callable[[PreTrainedModel], Path]

N_NEW = (8, 12, 12)
"""Of what is cut off or summed up at 4 or 8 tokens, the second request passes a bound as it decodes, and again."""
N_PROMPT = (30, 5, 13)
CONFIG = EngineConfig(chunk_tokens=8, max_running=2)
"""Chunks shorter than the prompts, and one place fewer than requests: the third joins when the first has left."""


def prompts() -> list[list[int]]:
    random = torch.Generator().manual_seed(1)
    return [torch.randint(1, 190, (n,), generator=random).tolist() for n in N_PROMPT]


def eager(model: PreTrainedModel, prompt: list[int], n_new: int) -> tuple[list[int], Tensor]:
    """Return what plain `generate` makes: token ids, and the logits `[n_new, V]` they were picked from."""
    out = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=n_new,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits)


@cache
def expected(name: str, varied: bool) -> list[tuple[list[int], Tensor]]:
    """Return each prompt's token ids and logits, made once for all that must equal them."""
    reference = build(name, varied=varied)
    return [eager(reference, prompt, n_new) for prompt, n_new in zip(prompts(), N_NEW, strict=True)]


def assert_same_logits(
    actual: Tensor, reference: PreTrainedModel, prompt: list[int], tokens: list[int], expected: Tensor
) -> None:
    """Within 1e-4, or within twice the reference's own rounding error where that is larger (minimax: 1.2e-4)."""
    tolerance = 1e-4
    if not torch.allclose(actual, expected, rtol=tolerance, atol=tolerance):
        exact_tokens, exact = eager(deepcopy(reference).double(), prompt, len(tokens))
        assert exact_tokens == tokens
        tolerance = max(tolerance, 2 * float((exact - expected).abs().max()))
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def kind(model: PreTrainedModel) -> str:
    return model.config.get_text_config().model_type


async def run_wave(folder: Path, record: dict[int, list[Tensor]]) -> list[tuple[int, ...]]:
    """Run three ragged requests through one engine; `record` collects their logits by the prompt's length."""
    results: dict[int, tuple[int, ...]] = {}

    async def one(engine: Engine, i: int, prompt: list[int]) -> None:
        results[i] = (await engine.generate(prompt, max_new_tokens=N_NEW[i])).token_ids

    async with Engine(folder, CONFIG) as engine, anyio.create_task_group() as group:
        for i, prompt in enumerate(prompts()):
            record[len(prompt)] = []
            group.start_soon(one, engine, i, prompt)
    return [results[i] for i in range(len(results))]


@pytest.mark.parametrize("varied", [False, True], ids=["default", "varied"])
@pytest.mark.parametrize("name", included())
def test_a_ragged_wave_equals_eager_generate(
    name: str, varied: bool, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = build(name, varied=varied)
    folder = save(reference)
    record: dict[int, list[Tensor]] = {}
    pick = Sampler.pick

    def recording(self: Sampler, logits: Tensor, context: list[int]) -> tuple[int, float | None]:
        prompt = next(n for p, n in zip(prompts(), N_PROMPT, strict=True) if context[: len(p)] == p)
        record[prompt].append(logits.clone())
        return pick(self, logits, context)

    monkeypatch.setattr(Sampler, "pick", recording)
    tokens = anyio.run(run_wave, folder, record)
    for prompt, made, (ids, logits) in zip(prompts(), tokens, expected(name, varied), strict=True):
        assert list(made) == ids
        assert_same_logits(torch.stack(record[len(prompt)]), reference, prompt, ids, logits)


@pytest.mark.parametrize("name", included())
def test_attached_generate_equals_eager_generate(name: str, save: Save) -> None:
    reference = build(name)
    attached = fiddler.attach(save(reference))
    for prompt, (ids, logits) in zip(prompts(), expected(name, False), strict=True):
        tokens, made = eager(attached, prompt, len(ids))
        assert tokens == ids
        assert_same_logits(made, reference, prompt, ids, logits)


@pytest.mark.parametrize("name", included())
def test_packed_lists_what_has_no_state_but_keys_and_values(name: str) -> None:
    model = build(name)
    assert (kind(model) in PACKED) == (not stateful(model))


def test_every_architecture_behind_the_seam_is_run_or_excluded_for_a_reason() -> None:
    assert set(architectures()) == set(included()) | set(excluded())
    assert not set(included()) & set(excluded())
    assert all(reason.strip() for reason in excluded().values())
    assert len(included()) >= 57  # as of transformers 5.17, the lowest version


def test_the_table_in_the_docs_is_up_to_date() -> None:
    """Made with the newest transformers; an older one must not run what the table does not know."""
    table = (Path(__file__).parent.parent / "docs" / "architectures.md").read_text()
    assert all(f"| {name} |" in table for name in (*included(), *excluded()))
    version, n_included, n_excluded = transformers.__version__, len(included()), len(excluded())
    if f"transformers {version}:" in table:
        assert f"transformers {version}: {n_included} included, {n_excluded} excluded" in table
