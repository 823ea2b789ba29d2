"""A prompt is copied when it is submitted: who changes it later changes nothing; some cannot be read."""

import sys
from array import array
from collections import UserList, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
import torch

from fiddler import Engine, GenerationConfig, PromptError
from fiddler.text.prompts import Bound, copy_prompt
from tests.support.tiny import save_tiny

IDS = [5, 6, 7]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("tiny"))
    file = folder / "chat_template.jinja"
    file.write_text("{% for message in messages %}{{ message | tojson }}{% endfor %}")  # says all there is
    return folder


def of(value: Any, length: int = 100) -> Any:
    return copy_prompt(value, Bound(length, f"{length}"))


@pytest.mark.parametrize(
    "ids",
    [
        IDS,
        tuple(IDS),
        range(5, 8),
        deque(IDS),
        UserList(IDS),
        array("i", IDS),
        [np.int64(5), np.uint8(6), 7],
        np.array(IDS),
        np.array(IDS, dtype=np.uint16),
        np.array([5, 0, 6, 0, 7])[::2],
        np.array(IDS, dtype=object),
        torch.tensor(IDS),
        torch.tensor(IDS, dtype=torch.int32),
        list(torch.tensor(IDS)),
    ],
    ids=lambda ids: f"{type(ids).__name__} of {type(ids[0]).__name__}",
)
def test_token_ids_are_whole_numbers_however_they_are_given(ids: Any) -> None:
    found = of(ids)
    assert found == IDS
    assert {type(i) for i in found} == {int}


class Panic(BaseException):
    """As Rust's is: no `Exception`."""


class Raises(Sequence[int]):
    """Raises in one of the methods by which it is read."""

    def __init__(self, where: str, error: BaseException) -> None:
        self.where = where
        self.error = error

    def _at(self, where: str) -> None:
        if where == self.where:
            raise self.error

    def __len__(self) -> int:
        self._at("len")
        return 3

    def __iter__(self) -> Iterator[int]:
        self._at("iter")
        return iter([self[i] for i in range(3)])

    def __getitem__(self, i: Any) -> Any:
        self._at("getitem")
        return IDS[i]


class Endless(Sequence[Any]):
    def __init__(self, item: Any, length: int) -> None:
        self.item = item
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: Any) -> Any:
        return self.item


class Hostile(Mapping[str, Any]):
    def __getitem__(self, key: str) -> Any:
        raise Panic("no")

    def __iter__(self) -> Iterator[str]:
        return iter(["role"])

    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize(
    "error", [ValueError("no"), KeyError(3), Panic("no"), SystemExit(1), GeneratorExit()], ids=repr
)
@pytest.mark.parametrize("where", ["len", "iter", "getitem"])
def test_a_prompt_that_raises_while_it_is_read_is_refused(where: str, error: BaseException) -> None:
    with pytest.raises(PromptError, match=type(error).__name__) as caught:
        of(Raises(where, error))
    assert caught.value.__cause__ is error


def test_ctrl_c_is_the_callers_own() -> None:
    with pytest.raises(KeyboardInterrupt):
        of(Raises("len", KeyboardInterrupt()))


def looped() -> list[dict[str, Any]]:
    message: dict[str, Any] = {"role": "user"}
    message["content"] = [message]
    return [message]


@pytest.mark.parametrize(
    "prompt",
    [
        5,
        None,
        b"bytes",
        bytearray(b"bytes"),
        memoryview(b"bytes"),
        {"role": "user"},
        {5, 6},
        iter(IDS),
        [5.0],
        [True, False],
        ["text"],
        [5, None],
        [-1],
        [[5, 6]],
        [IDS, {"role": "user"}],
        [{"role": "user"}, 5],
        [[{"role": "user", "content": "a batch"}]],
        np.array([IDS]),
        np.array(5),
        np.array([5.0]),
        np.array([True]),
        np.array([-1]),
        np.array(["a"]),
        np.ma.masked_array(IDS, mask=[0, 1, 0]),
        torch.tensor([IDS]),
        torch.tensor(5),
        torch.tensor([5.0]),
        torch.tensor(IDS, device="meta"),
        [Hostile()],
        looped(),
        [{"role": "user", "content": (part for part in "abc")}],
        [{"role": "user", "content": Endless("a", sys.maxsize)}],
        [{"role": "user", "content": Endless(Endless("a", 10**4), 10**4)}],
    ],
    ids=lambda prompt: f"{type(prompt).__name__}-{prompt!r:.40}".partition(" at 0x")[0],  # workers compare them
)
def test_what_is_no_prompt_is_refused(prompt: Any) -> None:
    with pytest.raises(PromptError):
        of(prompt)


@pytest.mark.parametrize(
    "prompt",
    [range(10**12), Endless(5, 10**15), [5] * 101, np.zeros(101, dtype=int), torch.zeros(101, dtype=torch.int64)],
    ids=lambda prompt: type(prompt).__name__,
)
def test_what_cannot_fit_is_refused_before_it_is_read(prompt: Any) -> None:
    with pytest.raises(PromptError, match=r"too long: \d+ tokens leave no room within 100"):
        of(prompt)


def test_a_sequence_is_read_as_far_as_it_says() -> None:
    assert of(Endless(5, 3)) == [5, 5, 5]

    class Short(Endless):
        def __iter__(self) -> Iterator[int]:
            return iter([5])

    with pytest.raises(PromptError, match="3 items, and has 1"):
        of(Short(5, 3))


def test_messages_keep_their_values() -> None:
    messages = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "a"}, {"type": "json", "of": ({"x": 1.5}, None, True)}],
        },
        UserDictLike(role="assistant", tool_calls=[{"function": {"arguments": {"n": [1, [2, [3]]]}}}]),
    ]
    found = of(messages)
    assert found == [messages[0], dict(messages[1])]
    assert type(found[1]) is dict


class UserDictLike(Mapping[str, Any]):
    def __init__(self, **fields: Any) -> None:
        self.fields = fields

    def __getitem__(self, key: str) -> Any:
        return self.fields[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.fields)

    def __len__(self) -> int:
        return len(self.fields)


def change_list(prompt: Any) -> None:
    prompt[:] = [1]


def change_array(prompt: Any) -> None:
    prompt[...] = 1


CHANGES: list[tuple[Any, Callable[[Any], object]]] = [
    (IDS.copy(), change_list),
    (deque(IDS), lambda ids: ids.append(9)),
    (np.array(IDS), change_array),
    (torch.tensor(IDS), change_array),
    (
        [{"role": "user", "content": "Hi"}],
        lambda messages: messages.append({"role": "assistant", "content": "Hello"}),
    ),
    ([{"role": "user", "content": "Hi"}], lambda messages: messages[0].update(content="Hello")),
    ([{"role": "user", "content": "Hi"}], lambda messages: messages.clear()),
    (
        [{"role": "user", "content": [{"type": "text", "text": "Hi"}], "tools": {"a": {"b": ["c"]}}}],
        lambda messages: (messages[0]["content"][0].update(text="Hello"), messages[0]["tools"]["a"]["b"].clear()),
    ),
]


@pytest.mark.anyio
async def test_who_changes_his_prompt_later_changes_nothing(tiny: Path) -> None:
    one = GenerationConfig(max_new_tokens=1, do_sample=False, eos_token_id=-1)
    async with Engine(tiny) as engine:
        for original, change in CHANGES:
            prompt = deepcopy(original)
            expected = (await engine.generate(prompt, one)).usage.prompt_tokens
            stream = engine.generate_stream(prompt, one)
            change(prompt)
            assert repr(prompt) != repr(original)
            tokens = [token async for token in stream]
            assert tokens[-1].usage is not None
            assert tokens[-1].usage.prompt_tokens == expected


@pytest.mark.anyio
async def test_who_changes_his_options_later_changes_nothing(tiny: Path) -> None:
    async with Engine(tiny) as engine:
        free = await engine.generate(IDS, GenerationConfig(max_new_tokens=9, do_sample=False, eos_token_id=-1))
        eos, stops = [-1], ["\0"]
        config = GenerationConfig(max_new_tokens=9, do_sample=False, eos_token_id=eos, stop_strings=stops)
        again: list[int] = [-1]
        streams = [engine.generate_stream(IDS, config), engine.generate_stream(IDS, config, eos_token_id=again)]
        for ids in (eos, again, config.eos_token_id):
            ids.extend(free.token_ids)
        stops.append(free.text[0])
        config.stop_strings.append(free.text[0])
        config.max_new_tokens, config.do_sample, config.temperature = 1, True, 2.0
        for stream in streams:
            assert tuple([token.id async for token in stream]) == free.token_ids


@pytest.mark.anyio
async def test_a_prompt_that_cannot_be_read_says_so_when_the_stream_is_awaited(tiny: Path) -> None:
    with anyio.fail_after(30):
        async with Engine(tiny) as engine:
            stream = engine.generate_stream(Raises("getitem", Panic("no")))
            with pytest.raises(PromptError, match="cannot be read: Panic: no"):
                await stream
            with pytest.raises(PromptError, match="cannot be read: Panic: no"):
                await anext(engine.generate_stream([Hostile()]))
            with pytest.raises(PromptError, match="text, token ids"):
                await engine.generate(None)  # type: ignore[arg-type]
            with pytest.raises(PromptError, match="RuntimeError: no"):
                engine.count_tokens(Raises("iter", RuntimeError("no")))
            assert engine.count_tokens(np.array(IDS)) == 3
            assert (await engine.generate(IDS, max_new_tokens=2)).usage.completion_tokens == 2
