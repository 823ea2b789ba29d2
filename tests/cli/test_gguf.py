"""A GGUF file under the command line: its words make the prompt, and its bytes are what `inspect` counts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from transformers import PreTrainedTokenizerFast

from fiddler import CheckpointError, EngineConfig
from fiddler.models.loaded import load
from fiddler.store.folder import find_checkpoint
from fiddler.text.tokenizer import Text
from tests.cli.test_commands import run, run_json
from tests.formats.folders import Pair
from tests.formats.gguf_marks import needs_tables
from tests.formats.gguf_writer import WORDS, of_experts, write_pair
from tests.support.tiny import N_EXPERTS, TEMPLATE, tiny_tokenizer

pytestmark = needs_tables


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair(tmp_path_factory.mktemp("gguf"), "qwen3moe", of_experts("Q4_K", "Q8_0"))


def test_inspect_counts_the_bytes_of_the_file(pair: Pair) -> None:
    facts = run_json("inspect", "-m", pair.quantised)
    assert (facts["experts_dtype"], facts["dtype"], facts["model_type"]) == ("q4_k", "bfloat16", "qwen3_moe")
    expert = 3 * 256 * 144  # rows of one block
    assert facts["bytes_per_expert"] == expert
    assert facts["experts"] == {"parameters": 2 * N_EXPERTS * 3 * 256 * 256, "bytes": 2 * N_EXPERTS * expert}
    assert facts["file_bytes"] < pair.quantised.stat().st_size
    assert "q4_k" in run("inspect", "-m", pair.quantised).stdout


def test_a_text_is_completed_with_the_words_of_the_file(pair: Pair) -> None:
    made = run_json("generate", "-m", pair.quantised, "-p", "the cat", "--max-new-tokens", 4, "--kernels", "linear")
    assert made["usage"] == {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9}  # the, space, c, a, t
    assert made["text"]


def test_words_and_template_are_those_of_the_file(pair: Pair) -> None:
    text = Text.open(pair.quantised)
    try:
        plain = tiny_tokenizer()
        assert text.encode("the Theöry\n") == [WORDS.index("the"), *plain(" Theöry\n").input_ids[:2], *rest(plain)]
        said = [{"role": "user", "content": "hi"}]
        assert text.encode(said) == plain.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
        assert text.tokenizer is not None
        assert text.tokenizer.chat_template == TEMPLATE
        assert text.tokenizer.eos_token == "<|im_end|>"
    finally:
        text.close()


def rest(plain: PreTrainedTokenizerFast) -> list[int]:
    """Return the ids of what follows ` T` in `the Theöry`: `h` and `e` are no word of their own after it."""
    return list(plain("heöry\n").input_ids)


def test_texts_end_where_the_file_says(pair: Pair) -> None:
    loaded = load(pair.quantised, EngineConfig(kernels="linear"))
    assert loaded.model.generation_config.eos_token_id == [WORDS.index("<|im_end|>")]


def test_a_file_without_words_takes_token_ids(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, "qwen3moe", of_experts("Q8_0"), tokenizer=False)
    ids = json.dumps([5, 6, 7])
    assert not Text.open(pair.quantised).known
    result = run("generate", "-m", pair.quantised, "-p", ids, "--kernels", "linear")
    assert result.exit_code != 0
    assert "no fast tokenizer" in result.stderr


def _with(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[Any], Any]) -> None:
    add = getattr(GGUFWriter, name)
    monkeypatch.setattr(GGUFWriter, name, lambda writer, value: add(writer, change(value)))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        pytest.param("add_eos_token_id", lambda _: 1 << 20, id="an end beyond the words"),
        pytest.param("add_tokenizer_model", lambda _: "unheard-of", id="another kind"),
        pytest.param("add_token_merges", lambda _: ["t", "q q q"], id="merges of no two"),
    ],
)
def test_words_that_make_no_tokenizer_are_refused(
    name: str, change: Callable[[Any], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with(monkeypatch, name, change)
    pair = write_pair(tmp_path, "qwen3moe", of_experts("Q8_0"))
    with pytest.raises(CheckpointError, match=r"tokenizer of .* cannot be read"):
        Text.open(find_checkpoint(pair.quantised))


def test_quantize_wants_floats(pair: Pair, tmp_path: Path) -> None:
    result = run("quantize", pair.quantised, tmp_path / "to", "--to", "int4")
    assert result.exit_code == 1
    assert "is GGUF" in result.stderr
