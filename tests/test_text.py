"""Prompts into token ids, and token ids into text as they come: whole characters, cut before a stop string."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fiddler.errors import PromptError
from fiddler.models.text import Text

CORPUS = [
    "the quick brown fox jumps over the lazy dog, the end of the story",
    "naïve café, déjà vu — 日本語の文章, 中文句子, 😀😃😄 and 👩‍👩‍👧 families",
    "def stop(self): return self.stopped  # STOP the stopping",
]
ALPHABET = "abst é\u0301日本😀👩\u200d\ufe0f\n<|>STOP"
# Without U+FFFD, which is what a decoder says for half a character.
characters = st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")
texts = st.one_of(st.text(alphabet=ALPHABET, max_size=30), st.text(alphabet=characters, max_size=12))


@cache
def trained() -> Text:
    """A byte-level BPE whose tokens are pieces of words, and parts of characters that are rare."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS * 3, trainer)
    return Text(PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>"))


@cache
def bytewise() -> Text:
    """A token a byte, with a chat template."""
    return Text(tiny_tokenizer())


@cache
def spaced() -> Text:
    """A tokenizer as Llama's: words carry their leading space, and the first space of a text is dropped."""
    vocabulary = ["<unk>", "▁one", "▁two", ",", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(vocabulary)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Text(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


def ids_of(text: Text, words: str) -> list[int]:
    assert text.tokenizer is not None
    return list(text.tokenizer(words, add_special_tokens=False)["input_ids"])


def whole(text: Text, ids: Sequence[int]) -> str:
    """Decode at once what a decoder is given piece by piece."""
    assert text.tokenizer is not None
    return text.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def stream(text: Text, ids: Sequence[int], prompt: Sequence[int] = (), stops: Sequence[str] = ()) -> list[str]:
    """Return what came out with each token, and what was held back at the end; ends at a stop string."""
    decoder = text.decoder(prompt, stops)
    pieces = []
    for token in ids:
        piece, stopped = decoder.push(token)
        pieces.append(piece)
        if stopped:
            break
    return [*pieces, decoder.flush()]


class TestDecoder:
    @given(words=texts, prompt=texts)
    @settings(deadline=None)
    @pytest.mark.parametrize("text", [trained, bytewise], ids=["trained", "bytewise"])
    def test_pieces_add_up_to_the_text(self, text: Any, words: str, prompt: str) -> None:
        pieces = stream(text(), ids_of(text(), words), ids_of(text(), prompt))
        assert "".join(pieces) == words

    @given(words=texts, n_bytes=st.integers(0, 30))
    @settings(deadline=None)
    def test_no_character_is_ever_half_there(self, words: str, n_bytes: int) -> None:
        ids = ids_of(bytewise(), words)[:n_bytes]
        complete = words.encode()[: len(ids)].decode(errors="ignore")
        assert "".join(stream(bytewise(), ids)) == complete

    def test_a_character_comes_with_its_last_token(self) -> None:
        assert stream(bytewise(), ids_of(bytewise(), "é😀a")) == ["", "é", "", "", "", "😀", "a", ""]

    @given(ids=st.lists(st.integers(0, 258), max_size=20), prompt=texts)
    @settings(deadline=None)
    def test_any_tokens_in_any_order_decode_as_at_once(self, ids: list[int], prompt: str) -> None:
        prompt_ids = ids_of(bytewise(), prompt)
        at_once = whole(bytewise(), prompt_ids + ids).removeprefix(prompt)
        pieces = "".join(stream(bytewise(), ids, prompt_ids))
        assert at_once.startswith(pieces)
        assert set(at_once.removeprefix(pieces)) <= {"\ufffd"}, "an incomplete end waits for its rest"

    @given(words=st.text(alphabet="é日😀a", min_size=1, max_size=8), cut=st.integers(1, 30))
    @settings(deadline=None)
    def test_a_prompt_that_ends_inside_a_character_is_not_repeated(self, words: str, cut: int) -> None:
        ids = ids_of(bytewise(), "prompt " + words)
        cut = min(7 + cut, len(ids))
        begun = whole(bytewise(), ids[:cut]).rstrip("\ufffd")
        assert begun + "".join(stream(bytewise(), ids[cut:], ids[:cut])) == "prompt " + words

    def test_special_tokens_make_no_text(self) -> None:
        end = trained().tokenizer.eos_token_id  # type: ignore[union-attr]
        assert stream(trained(), [*ids_of(trained(), "dog"), end])[-2:] == ["", ""]

    def test_first_word_keeps_its_space_after_a_prompt(self) -> None:
        one, two = 1, 2
        assert stream(spaced(), [two, one], prompt=[one]) == [" two", " one", ""]
        assert stream(spaced(), [two, one]) == ["two", " one", ""]

    def test_without_a_tokenizer_there_is_no_text(self) -> None:
        assert stream(Text(None), [1, 2, 3]) == ["", "", "", ""]


class TestStopStrings:
    @staticmethod
    def expected(text: Text, ids: Sequence[int], stops: Sequence[str]) -> str:
        """Return the text before the earliest stop string, after the first token that completes one."""
        for n in range(1, len(ids) + 1):
            so_far = whole(text, ids[:n])
            found = [at for stop in stops if (at := so_far.find(stop)) >= 0]
            if found:
                return so_far[: min(found)]
        return whole(text, ids)

    @given(
        words=st.text(alphabet="abSTOP é", max_size=40),
        stops=st.lists(st.text(alphabet="abSTOP é", min_size=1, max_size=4), min_size=1, max_size=3),
    )
    @settings(deadline=None, max_examples=200)
    @pytest.mark.parametrize("text", [trained, bytewise], ids=["trained", "bytewise"])
    def test_text_ends_before_the_earliest(self, text: Any, words: str, stops: list[str]) -> None:
        ids = ids_of(text(), words)
        assert "".join(stream(text(), ids, stops=stops)) == self.expected(text(), ids, stops)

    @given(words=st.text(alphabet="ab", max_size=30), stop=st.text(alphabet="ab", min_size=1, max_size=5))
    @settings(deadline=None)
    def test_one_stop_string_cuts_where_find_finds_it(self, words: str, stop: str) -> None:
        at = words.find(stop)
        expected = words if at < 0 else words[:at]
        assert "".join(stream(bytewise(), ids_of(bytewise(), words), stops=[stop])) == expected

    @given(words=st.text(alphabet="abSTOP", max_size=30), stops=st.lists(st.sampled_from(["STOP", "ab", "aab"])))
    @settings(deadline=None)
    def test_only_a_possible_beginning_is_held_back(self, words: str, stops: list[str]) -> None:
        sent, decoder = "", bytewise().decoder([], stops)
        for n, token in enumerate(ids_of(bytewise(), words), start=1):
            piece, stopped = decoder.push(token)
            sent += piece
            if stopped:
                return
            held = words[len(sent) : n]
            assert not held or any(stop.startswith(held) for stop in stops)

    def test_one_that_spans_tokens_never_shows(self) -> None:
        decoder = bytewise().decoder([], ["STOP"])
        pushed = [decoder.push(token) for token in ids_of(bytewise(), "xSTOP")]
        assert pushed == [("x", False), ("", False), ("", False), ("", False), ("", True)]
        assert decoder.flush() == ""

    def test_what_was_held_back_in_vain_is_released(self) -> None:
        assert stream(bytewise(), ids_of(bytewise(), "STO!"), stops=["STOP"]) == ["", "", "", "STO!", ""]

    def test_what_is_held_back_at_the_end_is_flushed_once(self) -> None:
        decoder = bytewise().decoder([], ["STOP"])
        for token in ids_of(bytewise(), "ST"):
            assert decoder.push(token) == ("", False)
        assert decoder.flush() == "ST"
        assert decoder.flush() == ""

    def test_a_beginning_inside_a_failed_beginning_is_kept(self) -> None:
        assert stream(bytewise(), ids_of(bytewise(), "aab!"), stops=["ab!"]) == ["", "a", "", "", ""]

    def test_the_prompt_is_not_searched(self) -> None:
        prompt = ids_of(bytewise(), "ST")
        assert "".join(stream(bytewise(), ids_of(bytewise(), "OP"), prompt, ["STOP"])) == "OP"

    def test_need_a_tokenizer(self) -> None:
        with pytest.raises(PromptError, match="stop_strings need a tokenizer"):
            Text(None).decoder([1], ["a"])


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

    @pytest.mark.parametrize(
        "messages",
        [[{"role": "user"}], [{"role": "user", "content": "hi"}, 5], [{"role": "user", "content": 5}]],
        ids=["no content", "no message", "content of another kind"],
    )
    def test_what_the_template_cannot_take_is_refused(self, messages: Any) -> None:
        with pytest.raises(PromptError, match="the chat template refused the messages"):
            bytewise().encode(messages)

    def test_what_a_template_raises_is_passed_on(self) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(PromptError, match="roles must alternate") as caught:
            Text(tokenizer).encode(self.MESSAGES)
        assert caught.value.__cause__ is not None

    def test_a_template_that_says_nothing_makes_an_empty_prompt(self) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = "{# nothing #}"
        with pytest.raises(PromptError, match="the prompt is empty"):
            Text(tokenizer).encode(self.MESSAGES)


class TestOpen:
    def test_a_saved_tokenizer_encodes_as_before(self, tmp_path: Path) -> None:
        tiny_tokenizer().save_pretrained(tmp_path)
        opened = Text.open(tmp_path)
        assert opened.encode("Héllo") == bytewise().encode("Héllo")
        assert opened.encode(TestChat.MESSAGES) == bytewise().encode(TestChat.MESSAGES)

    def test_a_folder_without_one_understands_token_ids(self, tmp_path: Path) -> None:
        assert Text.open(tmp_path).tokenizer is None
