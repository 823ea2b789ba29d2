"""A GPU's memory is divided without a byte too many, and what does not fit says what to change."""

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiddler.errors import ConfigError
from fiddler.gpu.budget import GIVEN_UP, LEFT_FREE_BYTES, Division, budget, divide, shrunk

WANTED: dict[str, Any] = {
    "dense_bytes": 400,
    "kv_token_bytes": 3,
    "kv_tokens": 100,
    "workspace_bytes": 50,
    "slot_bytes": 64,
    "n_experts": 20,
    "asked_slots": None,
}
"""What comes before slots takes 750 bytes."""

wanted = st.fixed_dictionaries(
    {
        "dense_bytes": st.integers(0, 2000),
        "kv_token_bytes": st.integers(0, 9),
        "kv_tokens": st.integers(1, 400),
        "workspace_bytes": st.integers(0, 500),
        "slot_bytes": st.integers(1, 300),
        "n_experts": st.integers(1, 40),
        "asked_slots": st.none() | st.integers(0, 60),
    }
)
rooms = st.builds(
    Division,
    budget=st.integers(0, 10**6),
    dense=st.integers(0, 999),
    kv=st.integers(0, 999),
    workspace=st.integers(0, 999),
    slots=st.integers(0, 200),
    slot_bytes=st.integers(1, 300),
)


def divided(budget_bytes: int, **changes: Any) -> Division:
    return divide(budget_bytes, **(WANTED | changes))


def most_slots(options: dict[str, Any]) -> int:
    asked = options["asked_slots"]
    return options["n_experts"] if asked is None else min(asked, options["n_experts"])


class TestDivide:
    def test_slots_get_what_the_others_leave(self) -> None:
        room = divided(1000)
        assert room == Division(budget=1000, dense=400, kv=300, workspace=50, slots=3, slot_bytes=64)
        assert room.free == 1000 - 750 - 3 * 64

    @pytest.mark.parametrize(("asked", "slots"), [(None, 20), (7, 7), (20, 20), (1000, 20), (0, 0)])
    def test_there_are_no_more_slots_than_experts_or_than_asked_for(self, asked: int | None, slots: int) -> None:
        assert divided(10**6, asked_slots=asked).slots == slots

    def test_one_slot_is_enough_and_none_if_none_was_asked_for(self) -> None:
        assert divided(750 + 64).slots == 1
        assert divided(750, asked_slots=0).slots == 0
        for budget_bytes, asked in ((750 + 63, None), (750 + 63, 5), (749, 0)):
            with pytest.raises(ConfigError, match="GPU memory is too small"):
                divided(budget_bytes, asked_slots=asked)

    @given(budget_bytes=st.integers(0, 20_000), options=wanted)
    def test_fills_the_budget_and_no_more(self, budget_bytes: int, options: dict[str, Any]) -> None:
        most = most_slots(options)
        try:
            room = divide(budget_bytes, **options)
        except ConfigError:
            before = options["dense_bytes"] + options["workspace_bytes"]
            before += options["kv_tokens"] * options["kv_token_bytes"]
            assert budget_bytes < before + min(most, 1) * options["slot_bytes"]
            return
        assert room.budget == budget_bytes
        assert room.free >= 0
        assert min(most, 1) <= room.slots <= most
        assert room.slots == most or room.free < room.slot_bytes, "another slot would have fitted"

    @given(budget_bytes=st.integers(0, 20_000), options=wanted)
    def test_what_an_error_advises_is_enough_and_no_more_than_enough(
        self, budget_bytes: int, options: dict[str, Any]
    ) -> None:
        try:
            divide(budget_bytes, **options)
        except ConfigError as error:
            advice = str(error).splitlines()[-1]
        else:
            return
        least = re.search(r"vram_budget to at least (\d+)", advice)
        assert least is not None
        divide(int(least[1]), **options)
        with pytest.raises(ConfigError):
            divide(int(least[1]) - 1, **options)
        for way in advice.split("; or ")[1:]:
            changes: dict[str, Any] = {"asked_slots": 0} if "slots=0" in way else {}
            if found := re.search(r"kv_tokens .* to at most (\d+)", way):
                changes["kv_tokens"] = int(found[1])
                with pytest.raises(ConfigError):
                    divide(budget_bytes, **(options | changes | {"kv_tokens": int(found[1]) + 1}))
            assert changes, way
            divide(budget_bytes, **(options | changes))

    @pytest.mark.parametrize(
        ("budget_bytes", "changes", "named", "unnamed"),
        [
            (800, {}, ("kv_tokens (or max_context", "slots=0"), ()),
            (700, {}, ("kv_tokens (or max_context",), ("slots=0",)),
            (451, {}, (), ("kv_tokens", "slots=0")),
            (460, {"slot_bytes": 300}, ("slots=0 and kv_tokens (or max_context",), ()),
            (700, {"asked_slots": 0}, ("kv_tokens (or max_context",), ("slots=0",)),
            (100, {"asked_slots": 0}, (), ("kv_tokens", "slots=0")),
        ],
    )
    def test_an_error_names_the_options_that_help(
        self, budget_bytes: int, changes: dict[str, Any], named: tuple[str, ...], unnamed: tuple[str, ...]
    ) -> None:
        with pytest.raises(ConfigError) as caught:
            divided(budget_bytes, **changes)
        advice = str(caught.value).splitlines()[-1]
        assert "vram_budget" in advice
        assert all(name in advice for name in named)
        assert not any(name in advice for name in unnamed)

    def test_an_error_is_a_table_of_what_was_wanted(self) -> None:
        mib = 2**20
        options = {name: n * mib if name.endswith("_bytes") else n for name, n in WANTED.items()}
        with pytest.raises(ConfigError) as caught:
            divide(700 * mib, **options)
        assert str(caught.value).splitlines()[:-1] == [
            "GPU memory is too small for one slot:",
            "  budget                 700.0 MiB",
            "  dense weights          400.0 MiB",
            "  keys and values        300.0 MiB",
            "  workspace               50.0 MiB",
            "  slots                   64.0 MiB  1 of 67108864 bytes",
            "  missing                114.0 MiB",
        ]


class TestRoom:
    def test_a_table_adds_up(self) -> None:
        mib = 2**20
        room = Division(1000 * mib, 400 * mib, 300 * mib, 50 * mib, slots=3, slot_bytes=64 * mib)
        rows = re.findall(r"^ +(\w[\w ]+?) +([\d.,]+) MiB", room.table(), re.MULTILINE)
        named = {name: float(size.replace(",", "")) for name, size in rows}
        assert named.pop("budget") == 1000.0 == sum(named.values())
        assert list(named) == ["dense weights", "keys and values", "workspace", "slots", "free"]


class TestShrunk:
    @given(room=rooms, by_bytes=st.integers(0, 10**5))
    def test_gives_up_enough_slots_or_all(self, room: Division, by_bytes: int) -> None:
        less = shrunk(room, by_bytes)
        n_given = room.slots - less.slots
        assert n_given == room.slots or n_given * room.slot_bytes >= by_bytes
        assert n_given >= room.slots / GIVEN_UP
        assert less.slots >= 0
        assert less.free == room.free, "what slots gave up went to the workspace"
        assert replace(less, slots=room.slots, workspace=room.workspace) == room

    @given(room=rooms, by_bytes=st.integers(0, 10**5))
    def test_gives_up_no_more_than_it_has_to(self, room: Division, by_bytes: int) -> None:
        n_kept = shrunk(room, by_bytes).slots
        one_fewer = room.slots - n_kept - 1
        assert n_kept == room.slots == 0 or (
            one_fewer * room.slot_bytes < by_bytes or one_fewer < room.slots / GIVEN_UP
        )

    @given(room=rooms)
    def test_ends(self, room: Division) -> None:
        n_times = 0
        while room.slots:
            room, n_times = shrunk(room, 1), n_times + 1
            assert n_times < 100
        assert shrunk(room, 1) == room


class TestBudget:
    @given(free_bytes=st.integers(0, 2**36))
    def test_is_nearly_all_that_is_free_unless_told(self, free_bytes: int) -> None:
        assert budget(None, free_bytes) == max(free_bytes - LEFT_FREE_BYTES, 0)

    def test_is_what_was_asked_for(self) -> None:
        assert budget(10, 10) == 10
        with pytest.raises(ConfigError, match=r"^vram_budget=11 is more than the 10 .* set it to at most 10"):
            budget(11, 10)
