"""Token ids into text as they come: whole characters, no special tokens, cut before a stop string."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import StopStringCriteria

from fiddler.errors import PromptError
from fiddler.text.tokenizer import Text
from tests.support.texts import (
    FAMILIES,
    bytewise,
    gemma,
    ids_of,
    llama,
    spaced,
    stream,
    texts,
    trained,
    unigram,
    whole,
)


class TestDecoder:
    @given(words=texts, prompt=texts)
    @settings(deadline=None)
    @pytest.mark.parametrize("text", [trained, bytewise], ids=["trained", "bytewise"])
    def test_pieces_add_up_to_the_text(self, text: Any, words: str, prompt: str) -> None:
        pieces = stream(text(), ids_of(text(), words), ids_of(text(), prompt))
        assert "".join(pieces) == words

    @given(data=st.data())
    @settings(deadline=None, max_examples=300)
    @pytest.mark.parametrize("text", FAMILIES)
    def test_any_tokens_add_up_to_what_is_decoded_at_once(self, text: Callable[[], Text], data: Any) -> None:
        ids = data.draw(st.lists(st.integers(0, n_tokens(text()) + 1), max_size=24))
        pieces = stream(text(), ids)
        assert "".join(pieces) == whole(text(), ids)

    @given(data=st.data())
    @settings(deadline=None, max_examples=300)
    @pytest.mark.parametrize("text", [llama, gemma, unigram])
    def test_runs_of_bytes_add_up_to_what_is_decoded_at_once(self, text: Callable[[], Text], data: Any) -> None:
        words = data.draw(st.text(alphabet="é日😀\n", max_size=6)).encode()
        spoilt = data.draw(st.binary(max_size=2))
        at = data.draw(st.integers(0, len(words)))
        first = text().tokenizer.convert_tokens_to_ids("<0x00>")  # type: ignore[union-attr]
        ids = [first + byte for byte in words[:at] + spoilt + words[at:]]
        cut = data.draw(st.integers(0, len(ids)))
        ids = [3, *ids[:cut], data.draw(st.sampled_from([0, 1, 2, 3, 4, 6, 10**6])), *ids[cut:]]
        assert "".join(stream(text(), ids)) == whole(text(), ids)

    @given(words=texts, n_bytes=st.integers(0, 30))
    @settings(deadline=None)
    def test_no_character_is_ever_half_there(self, words: str, n_bytes: int) -> None:
        ids = ids_of(bytewise(), words)[:n_bytes]
        complete = words.encode()[: len(ids)].decode(errors="ignore")
        *pieces, end = stream(bytewise(), ids)
        assert "".join(pieces) == complete
        assert complete + end == whole(bytewise(), ids), "at the end it is shown as what it is"

    def test_a_byte_that_begins_no_character_ends_nothing(self) -> None:
        ids = llama().tokenizer.convert_tokens_to_ids(["<0x0A>", "<0xE2>", "▁one"])  # type: ignore[union-attr]
        assert stream(llama(), ids) == ["", "", "\ufffd\ufffd one", ""]

    def test_a_character_in_bytes_comes_with_the_token_behind_it(self) -> None:
        ids = llama().tokenizer.convert_tokens_to_ids(["▁one", "<0xC3>", "<0xA9>", "▁two"])  # type: ignore[union-attr]
        assert stream(llama(), ids) == ["one", "", "", "é two", ""]

    def test_bytes_behind_a_prompt_that_ends_in_bytes(self) -> None:
        name = llama().tokenizer.convert_tokens_to_ids  # type: ignore[union-attr]
        run = [f"<0x{byte:02X}>" for byte in "日本語の文章".encode()]
        for cut in range(1, len(run)):
            prompt, ids = name(["▁one", *run[:cut]]), name([*run[cut:], "▁two"])
            begun = len(b"".join(bytes([int(token[3:5], 16)]) for token in run[:cut]).decode(errors="ignore"))
            assert "".join(stream(llama(), ids, prompt)) == "日本語の文章"[begun:] + " two"

    def test_a_character_comes_with_its_last_token(self) -> None:
        assert stream(bytewise(), ids_of(bytewise(), "é😀a")) == ["", "é", "", "", "", "😀", "a", ""]

    @given(ids=st.lists(st.integers(0, 258), max_size=20), prompt=texts)
    @settings(deadline=None)
    def test_any_tokens_behind_a_prompt_decode_as_at_once(self, ids: list[int], prompt: str) -> None:
        prompt_ids = ids_of(bytewise(), prompt)
        at_once = whole(bytewise(), prompt_ids + ids).removeprefix(prompt)
        assert "".join(stream(bytewise(), ids, prompt_ids)) == at_once

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


def n_tokens(text: Text) -> int:
    assert text.tokenizer is not None
    return len(text.tokenizer)


def stopped_at(text: Text, ids: Sequence[int], stops: Sequence[str], prompt: Sequence[int]) -> int | None:
    """Return after how many tokens transformers' own criterion stops."""
    criterion = StopStringCriteria(text.tokenizer, list(stops))
    for n in range(1, len(ids) + 1):
        if criterion(torch.tensor([[*prompt, *ids[:n]]]), None).item():
            return n
    return None


class TestSpecialStopStrings:
    """Special tokens are no part of the text, but stop strings find them: transformers searches tokens."""

    @staticmethod
    def pushed(
        text: Text, ids: Sequence[int], stops: Sequence[str], prompt: Sequence[int]
    ) -> tuple[str, int | None]:
        decoder, made = text.decoder(prompt, stops), ""
        for n, token in enumerate(ids, start=1):
            piece, stopped = decoder.push(token)
            made += piece
            if stopped:
                assert decoder.flush() == ""
                return made, n
        return made + decoder.flush(), None

    @pytest.mark.parametrize(
        ("pieces", "stop", "made", "n"),
        [
            (["▁two", "</s>", "▁one"], "</s>", "two", 2),
            (["▁two", "</s>", "<0x0A>", "▁one"], "</s>\n", "two", 3),
            (["▁two", "▁one", "</s>"], "one</s>", "two ", 3),
            (["▁two", "</s>", "<s>"], "</s><s>", "two", 3),
            (["▁two", "</s>", "▁one"], "</s>\n", "two one", None),
            (["▁two", "</s>", "▁one", "<s>"], "<s>", "two one", 4),
            (["▁two", "<0x0A>", "▁one"], "\n", "two", 2),
            (["▁two", "<0xC3>", "<0xA9>", "▁one"], "é", "two", 3),
            (["▁two", "</s>", "▁one"], "/", "two", 2),
            (["▁two", "<0x0A>", "</s>", "▁one"], "\n</s>", "two", 3),
            (["▁two", "<0x0A>", "</s>", "<0x0A>", "▁one"], "</s>\n", "two\n", 4),
            (["▁two", "<0x0A>", "</s>", "<0x0A>", "▁one"], "\n\n", "two\n\n one", None),
            (["▁two", "<0xC3>", "</s>", "<0xA9>", "▁one"], "é</s>", "two", 4),
        ],
    )
    def test_text_before_one_is_handed_out(self, pieces: list[str], stop: str, made: str, n: int | None) -> None:
        tokenizer: Any = llama().tokenizer
        ids = tokenizer.convert_tokens_to_ids(pieces)
        prompt = tokenizer.convert_tokens_to_ids(["▁one", ","])
        text, stopped = self.pushed(llama(), ids, [stop], prompt)
        assert (text.removeprefix(" "), stopped) == (made, n)

    @given(data=st.data())
    @settings(deadline=None, max_examples=150)
    @pytest.mark.parametrize("text", [bytewise, trained])
    def test_generation_stops_where_transformers_stops(self, text: Callable[[], Text], data: Any) -> None:
        pieces = st.sampled_from(["a", "b", "ab", "\n", "é", *text().tokenizer.all_special_tokens])  # type: ignore[union-attr]
        ids = ids_of(text(), "".join(data.draw(st.lists(pieces, max_size=12))))
        stops = ["".join(data.draw(st.lists(pieces, min_size=1, max_size=3)))]
        prompt = ids_of(text(), "prompt:")
        made, n = self.pushed(text(), ids, stops, prompt)
        assert n == stopped_at(text(), ids, stops, prompt)
        assert whole(text(), ids[:n]).startswith(made)

    @given(data=st.data())
    @settings(deadline=None, max_examples=150)
    @pytest.mark.parametrize("text", [bytewise, trained, llama, gemma, unigram])
    def test_whatever_tokens_come(self, text: Callable[[], Text], data: Any) -> None:
        """But for spoilt runs of bytes and characters around a special token: transformers goes by tokens."""
        tokenizer: Any = text().tokenizer
        ascii_bytes = [tokenizer.convert_tokens_to_ids(f"<0x{i:02X}>") for i in (0x0A, 0x20, 0x3C, 0x61)]
        tokens = st.integers(0, 19) if text in (llama, gemma, unigram) else st.integers(0, len(tokenizer) - 1)
        some = st.sampled_from([*tokenizer.all_special_ids, *(i for i in ascii_bytes if i is not None)])
        ids = data.draw(st.lists(st.one_of(tokens, some, some), min_size=1, max_size=12))
        prompt = ids_of(text(), "a") if text in (bytewise, trained) else [tokenizer.convert_tokens_to_ids(",")]
        spelled = tokenizer.decode([*prompt, *ids])[1:]
        apart = re.sub("|".join(map(re.escape, tokenizer.all_special_tokens)), "", spelled)
        assume(apart == whole(text(), [*prompt, *ids])[1:])
        at = data.draw(st.integers(0, len(spelled) - 1))
        stop = spelled[at : at + data.draw(st.integers(1, 7))]
        assume("\ufffd" not in stop)
        made, n = self.pushed(text(), ids, [stop], prompt)
        assert n == stopped_at(text(), ids, [stop], ())
        assert whole(text(), [*prompt, *ids[:n]])[1:].startswith(made)


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
