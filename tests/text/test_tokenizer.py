"""Prompts into token ids: text, ids, or chat messages; what is refused, and with which sentence."""

import json
from collections.abc import Sequence
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from fiddler.errors import CheckpointError, PromptError
from fiddler.text.reading import TooMany
from fiddler.text.tokenizer import Text
from tests.support.texts import bytewise, trained, wordpiece
from tests.support.tiny import tiny_tokenizer


class TestEncode:
    def test_text_equals_the_tokenizers_own(self) -> None:
        text = trained()
        assert text.encode("the quick café 😀") == text.tokenizer("the quick café 😀")["input_ids"]  # type: ignore[misc]

    @pytest.mark.parametrize("prompt", [[1, 2, 0], (1, 2, 0)])
    def test_token_ids_are_taken_as_they_are(self, prompt: Sequence[int]) -> None:
        assert trained().encode(prompt) == [1, 2, 0]
        assert Text(None).encode(prompt) == [1, 2, 0]

    def test_the_callers_list_is_not_kept(self) -> None:
        prompt = [1, 2]
        assert trained().encode(prompt) is not prompt

    @pytest.mark.parametrize("prompt", ["", []], ids=["text", "ids"])
    def test_empty_prompts_are_refused(self, prompt: Any) -> None:
        with pytest.raises(PromptError, match="the prompt is empty"):
            trained().encode(prompt)

    @pytest.mark.parametrize("prompt", [[-1], [1, 2.0], ["a"], [[1]], [None], [1, {"role": "user"}]], ids=str)
    def test_lists_of_anything_else_are_refused(self, prompt: Any) -> None:
        with pytest.raises(PromptError, match=r"must be text, token ids .* or chat messages"):
            trained().encode(prompt)

    @pytest.mark.parametrize("prompt", [5, None, b"bytes", {"role": "user", "content": "hi"}, {1, 2}], ids=str)
    def test_other_kinds_are_refused_by_name(self, prompt: Any) -> None:
        with pytest.raises(PromptError, match=f"not {type(prompt).__name__}$"):
            trained().encode(prompt)

    def test_half_a_surrogate_pair_is_refused(self) -> None:
        with pytest.raises(PromptError, match="the tokenizer refused the text"):
            trained().encode("\ud83d")

    def test_text_without_a_tokenizer_is_refused(self) -> None:
        with pytest.raises(PromptError, match="no fast tokenizer"):
            Text(None).encode("hello")


class TestChat:
    MESSAGES = (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Héllo 😀"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Bye"},
    )

    @pytest.mark.parametrize("n_messages", [1, 2, 4])
    def test_messages_equal_the_tokenizers_own_template(self, n_messages: int) -> None:
        messages = list(self.MESSAGES[:n_messages])
        tokenizer: Any = bytewise().tokenizer
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert bytewise().encode(messages) == expected

    def test_special_tokens_of_the_template_are_single_tokens(self) -> None:
        tokenizer: Any = bytewise().tokenizer
        ids = bytewise().encode(self.MESSAGES[:1])
        assert ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")

    @pytest.mark.parametrize("text", [trained(), Text(None)], ids=["no template", "no tokenizer"])
    def test_without_a_template_are_refused(self, text: Text) -> None:
        with pytest.raises(PromptError, match="no chat template"):
            text.encode(self.MESSAGES)

    def test_content_that_is_none_beside_tool_calls_is_no_content(self) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = "{{ messages[0] | tojson }}"
        calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
        message = {"role": "assistant", "content": None, "tool_calls": calls}
        text = Text(tokenizer)
        expected = text.encode(json.dumps({"role": "assistant", "tool_calls": calls}))
        assert text.encode([message]) == expected

    @pytest.mark.parametrize(
        ("messages", "sentence"),
        [
            ([{"role": "user"}], "message 1 has no content"),
            ([{"role": "user", "content": None}], "message 1 has no content"),
            ([{"content": "hi"}], "message 1 has no role"),
            ([{"role": 5, "content": "hi"}], "message 1 has no role"),
            ([{"role": "user", "content": "hi"}, 5], "message 2 is of type int"),
            ([{"role": "user", "content": "hi"}, [1]], "message 2 is of type list"),
            ([{"role": "user", "content": 5}], "content of message 1 is of type int"),
            ([{"role": "user", "content": {"text": "hi"}}], "content of message 1 is of type dict"),
            ([{"role": "user", "content": [5]}], "part 1 of message 1 is of type int"),
            ([{"role": "user", "content": [{"type": "text"}]}], "part 1 of message 1 has no text"),
            ([{"role": "user", "content": [{"type": []}]}], "part 1 of message 1 has a type that is no text"),
            ([{"role": "user", "content": "hi", "extra": object()}], "message 1 holds a value of type object"),
        ],
    )
    def test_what_is_no_message_is_refused(self, messages: Any, sentence: str) -> None:
        with pytest.raises(PromptError, match=sentence):
            bytewise().encode(messages)

    @pytest.mark.parametrize(
        "part",
        [
            {"type": "image", "image": "x.png"},
            {"type": "image"},
            {"type": "image_url", "image_url": {"url": "https://example.org/x.png"}},
            {"type": "input_image", "image_url": "x"},
            {"type": "input_audio", "input_audio": {"data": "x", "format": "wav"}},
            {"type": "audio", "audio_url": "x"},
            {"type": "video", "video": "x"},
            {"type": "file", "file": {"file_id": "x"}},
            {"type": "something_new", "data": "x"},
            {"image": "x.png"},
            {"type": "text", "text": "hi", "image_url": "x"},
            {"type": "image", "image": object()},  # of another library
            {"image": b"GIF89a"},
            {"type": "audio", "audio": np.zeros(3)},
            {"type": "text", "text": "hi", "image_url": np.zeros(3)},
        ],
    )
    def test_parts_that_are_no_text_are_refused_by_name(self, part: dict[str, Any]) -> None:
        name = part.get("type", "image") if part.get("type") != "text" else "image_url"
        with pytest.raises(PromptError, match=f"part 2 of message 1 is .*{name}.*takes text alone"):
            parts().encode([{"role": "user", "content": [{"type": "text", "text": "Look:"}, part]}])

    @pytest.mark.parametrize("key", ["images", "image", "audio", "videos", "files", "attachments"])
    def test_so_are_keys_of_messages(self, key: str) -> None:
        with pytest.raises(PromptError, match=f"message 1 has '{key}', but this model takes text alone"):
            parts().encode([{"role": "user", "content": "Look:", key: ["x"]}])
        assert parts().encode([{"role": "user", "content": "Look:", key: []}])

    def test_parts_of_text_are_the_templates(self) -> None:
        messages: Any = [
            {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": " two"}]}
        ]
        tokenizer: Any = parts().tokenizer
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert parts().encode(messages) == expected

    @pytest.mark.parametrize("content", ["sunny", {"degrees": 3}, [1, 2], [{"type": "text", "text": "x"}], 5])
    def test_a_tool_returns_any_value(self, content: Any) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = "{{ messages[0].content | tojson }}"
        text = Text(tokenizer)
        assert text.encode([{"role": "tool", "content": content}]) == text.encode(json.dumps(content))

    def test_what_a_template_raises_is_passed_on(self) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(PromptError, match="the chat template refused the messages: roles must alternate"):
            Text(tokenizer).encode(self.MESSAGES)

    def test_a_template_that_says_nothing_makes_an_empty_prompt(self) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = "{# nothing #}"
        with pytest.raises(PromptError, match="the prompt is empty"):
            Text(tokenizer).encode(self.MESSAGES)

    @pytest.mark.parametrize(
        "template",
        [
            "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}",
            "{% for m in messages %}{{ m.content | trim }}{% if loop.last %}{% break %}{% endif %}{% endfor %}",
            "{{ messages | tojson }}{{ messages[1] | tojson(indent=2) }}",
            "{{ strftime_now('%Y') }}{{ tools is none }}{{ documents is none }}",
            "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
            "{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(messages[1]['content']) }}",
            "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
            "{% for m in messages %}\n    {{ m.role }}\n{% endfor %}\n",
            "{{ messages[0].missing is defined }}{{ messages[-1].content.split('y') }}{{ add_generation_prompt }}",
        ],
    )
    def test_a_template_says_what_it_says_in_transformers(self, template: str) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
        expected: Any = tokenizer.apply_chat_template(
            list(self.MESSAGES), add_generation_prompt=True, return_dict=False
        )
        with closing(Text(tokenizer)) as text:
            assert text.encode(self.MESSAGES) == expected

    def test_of_several_templates_the_default_is_taken(self) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = {"default": "plain", "tool_use": "tools", "rag": "documents"}
        with closing(Text(tokenizer)) as text:
            assert text.encode(self.MESSAGES) == text.encode("plain")

    def test_several_without_a_default_are_refused_by_name(self) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = {"rag": "documents", "other": "x"}
        with closing(Text(tokenizer)) as text:
            with pytest.raises(PromptError, match=r"no default chat template.*rag"):
                text.encode(self.MESSAGES)
            assert text.encode("x")


@cache
def parts() -> Text:
    """A tokenizer whose template drops what it does not know, as most do."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
        "{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    )
    return Text(tokenizer)


class TestTooLong:
    """What cannot fit is refused by its beginning."""

    def test_ids_by_their_number(self) -> None:
        assert bytewise().read([3] * 513, 512) == TooMany(513, counted=True)
        assert bytewise().read([3] * 512, 512) == [3] * 512
        assert Text(None).read([None] * 10**6, 512) == TooMany(10**6, counted=True)  # type: ignore[list-item]

    @pytest.mark.parametrize("text", ["a" * 4_000_000, "😀" * 1_000_000], ids=["letters", "emoji"])
    def test_text_by_a_part_of_it(self, text: str) -> None:
        found = bytewise().read(text, 512)
        assert isinstance(found, TooMany)
        assert not found.counted
        assert 512 < found.n_tokens <= 4 * 4096

    def test_what_a_template_makes_by_a_part_of_it(self) -> None:
        found = bytewise().read([{"role": "user", "content": "word " * 200_000}], 512)
        assert isinstance(found, TooMany)

    @given(
        words=st.text(alphabet="ab é日\n", max_size=40), n_times=st.integers(1, 400), n_most=st.integers(1, 3000)
    )
    @settings(deadline=None, max_examples=40)
    @pytest.mark.parametrize("text", [trained, bytewise])
    def test_nothing_that_fits_is_refused(self, text: Any, words: str, n_times: int, n_most: int) -> None:
        prompt = "x" + words * n_times
        n_tokens = len(text().encode(prompt))
        found = text().read(prompt, n_most)
        if isinstance(found, TooMany):
            assert n_tokens > n_most
        else:
            assert len(found) == n_tokens

    def test_spaces_that_make_no_token_are_no_tokens(self) -> None:
        with closing(wordpiece_reader()) as text:
            assert text.read("do" + " " * 200_000 + "do", 16) == text.encode("do do")


def wordpiece_reader() -> Text:
    tokenizer: Any = wordpiece().tokenizer
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return Text(tokenizer)


class TestOwnCopy:
    """The tokenizer that is given out is the caller's: nothing done to it changes how prompts are read."""

    def test_settings_of_the_given_tokenizer_change_nothing(self) -> None:
        with closing(Text(tiny_tokenizer())) as text:
            before = text.encode("Hello, world")
            tokenizer: Any = text.tokenizer
            tokenizer("Hello, world", truncation=True, max_length=2, padding="max_length")
            tokenizer.add_tokens(["Hello"])
            tokenizer.chat_template = "changed"
            assert text.encode("Hello, world") == before
            assert text.encode(TestChat.MESSAGES) == bytewise().encode(TestChat.MESSAGES)
            assert text.tokenizer is tokenizer, "one copy, so that changes last"

    def test_truncation_and_padding_saved_in_the_file_are_off(self, tmp_path: Path) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.backend_tokenizer.enable_truncation(3)
        tokenizer.backend_tokenizer.enable_padding(length=20)
        tokenizer.save_pretrained(tmp_path)
        with closing(Text.open(tmp_path)) as text:
            assert len(text.encode("Hello")) == 5


class TestOpen:
    def test_a_saved_tokenizer_encodes_as_before(self, tmp_path: Path) -> None:
        tiny_tokenizer().save_pretrained(tmp_path)
        opened = Text.open(tmp_path)
        assert opened.encode("Héllo") == bytewise().encode("Héllo")
        assert opened.encode(TestChat.MESSAGES) == bytewise().encode(TestChat.MESSAGES)

    def test_a_folder_without_one_understands_token_ids(self, tmp_path: Path) -> None:
        assert Text.open(tmp_path).tokenizer is None

    @pytest.mark.parametrize("model_type", ["qwen3_moe", "olmoe"])
    def test_a_vocabulary_and_merges_are_a_tokenizer(self, model_type: str, tmp_path: Path) -> None:
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        (tmp_path / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate([*letters, "he"])}))
        (tmp_path / "merges.txt").write_text("#version: 0.2\nh e\n")
        expected = AutoTokenizer.from_pretrained(tmp_path)("hehe")["input_ids"]
        with closing(Text.open(tmp_path)) as text:
            assert text.encode("hehe") == expected

    @pytest.mark.parametrize("name", ["chat_template.json", "chat_template.jinja"])
    def test_a_template_in_a_file_of_its_own_is_taken(self, name: str, tmp_path: Path) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = None
        tokenizer.save_pretrained(tmp_path)
        template = "{{ messages[0].content }}!"
        (tmp_path / name).write_text(json.dumps({"chat_template": template}) if name.endswith("json") else template)
        with closing(Text.open(tmp_path)) as text:
            assert text.encode([{"role": "user", "content": "Hi"}]) == text.encode("Hi!")

    @pytest.mark.parametrize("content", ["{", "[]", '{"version": "1.0", "model": 5}', ""])
    def test_a_broken_file_is_refused(self, content: str, tmp_path: Path) -> None:
        tiny_tokenizer().save_pretrained(tmp_path)
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"the tokenizer of .* cannot be read"):
            Text.open(tmp_path)

    def test_a_pointer_in_a_file_s_place_is_named(self, tmp_path: Path) -> None:
        tiny_tokenizer().save_pretrained(tmp_path)
        (tmp_path / "tokenizer_config.json").write_text("version https://git-lfs.github.com/spec/v1\n")
        with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is a git-lfs pointer"):
            Text.open(tmp_path)

    def test_one_that_panics_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        class PanicError(BaseException):
            """As `PanicException` of a tokenizer written in Rust."""

        def panic(*_: object, **__: object) -> None:
            raise PanicError("called `Option::unwrap()` on a `None` value")

        tiny_tokenizer().save_pretrained(tmp_path)
        monkeypatch.setattr(AutoTokenizer, "from_pretrained", panic)
        with pytest.raises(CheckpointError, match="cannot be read: called"):
            Text.open(tmp_path)
