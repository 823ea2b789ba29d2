"""Keys and values in an arena: runs never overlap, and attention cannot tell them from buffers that grow."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from fiddler.config import EngineConfig
from fiddler.errors import EngineError
from fiddler.models.kv import KvArena, Run, SequenceKV
from fiddler.steps.request import KvRoom, Reserved
from fiddler.steps.step import StepRunner
from tests.architectures import build
from tests.support.placement import Placement, Script, Subject, Visit, run

SHAPES = {0: (2, 3, 4), 1: (1, 5, 2), 4: (3, 2, 2)}
"""By layer: heads, and the dimensions of keys and of values."""


def rows(layer: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    heads, key_dim, value_dim = SHAPES[layer]
    random = torch.Generator().manual_seed(seed)
    return (
        torch.randn(1, heads, n, key_dim, generator=random),
        torch.randn(1, heads, n, value_dim, generator=random),
    )


def reserved(arena: KvArena, n_tokens: int) -> Run:
    run = arena.reserve(n_tokens)
    assert run is not None
    return run


class Runs(RuleBasedStateMachine):
    """Who holds which tokens, against a list with an entry for every token."""

    @initialize(n_tokens=st.integers(0, 24))
    def make(self, n_tokens: int) -> None:
        self.arena = KvArena(n_tokens)
        self.owners: list[Run | None] = [None] * n_tokens
        self.runs: list[Run] = []

    @rule(n=st.integers(1, 12))
    def reserve(self, n: int) -> None:
        free = [all(o is None for o in self.owners[i : i + n]) for i in range(len(self.owners) - n + 1)]
        run = self.arena.reserve(n)
        if not any(free):
            assert run is None
            return
        assert run is not None
        assert (run.start, run.n_tokens, run.stop) == (free.index(True), n, free.index(True) + n)
        self.owners[run.start : run.stop] = [run] * n
        self.runs.append(run)

    @precondition(lambda self: self.runs)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        run = self.runs.pop(data.draw(st.integers(0, len(self.runs) - 1)))
        self.arena.release(run)
        self.owners[run.start : run.stop] = [None] * run.n_tokens
        with pytest.raises(ValueError, match=f"{run.start} to {run.stop} are not held"):
            self.arena.release(run)

    @invariant()
    def the_arena_agrees(self) -> None:
        self.arena.check()
        assert self.arena.n_free == self.owners.count(None)

    def teardown(self) -> None:
        for held in getattr(self, "runs", ()):
            self.arena.release(held)
            self.arena.check()
        if hasattr(self, "arena") and self.arena.n_tokens:
            assert reserved(self.arena, self.arena.n_tokens).start == 0


TestRuns = Runs.TestCase


def test_a_run_holds_a_token_at_least() -> None:
    with pytest.raises(ValueError, match="0 tokens"):
        KvArena(4).reserve(0)


def test_a_layer_is_made_when_it_is_first_needed_and_stays_where_it_is() -> None:
    arena = KvArena(10)
    sequence = SequenceKV(reserved(arena, 4))
    with pytest.raises(KeyError):
        arena.layer(1)
    assert (arena.nbytes, sequence.nbytes) == (0, 0)
    for layer, (heads, key_dim, value_dim) in SHAPES.items():
        sequence.append(layer, *rows(layer, 2, 0))
        keys, values = arena.layer(layer)
        assert keys.shape == (11, heads, key_dim)
        assert values.shape == (11, heads, value_dim)
        assert all(part.is_contiguous() and not part[2:].any() for part in (keys, values))
    n_floats = sum(heads * (key_dim + value_dim) for heads, key_dim, value_dim in SHAPES.values())
    assert (arena.nbytes, sequence.nbytes) == (11 * n_floats * 4, 4 * n_floats * 4)
    made = arena.layer(0)
    SequenceKV(reserved(arena, 6)).append(0, *rows(0, 6, 1))
    assert all(one is other for one, other in zip(arena.layer(0), made, strict=True))


def test_a_run_s_tokens_lie_in_the_arena_and_are_not_copied() -> None:
    arena = KvArena(10)
    reserved(arena, 3)
    run = reserved(arena, 5)
    sequence = SequenceKV(run)
    keys, values = rows(0, 4, 0)
    for i in range(4):
        sequence.append(0, keys[:, :, i : i + 1], values[:, :, i : i + 1])
    for whole, part, seen in zip(arena.layer(0), (keys, values), sequence.view(0), strict=True):
        assert torch.equal(whole[run.start : run.start + 4].transpose(0, 1)[None], part)
        assert torch.equal(seen, part)
        assert seen.data_ptr() == whole[run.start].data_ptr()


@pytest.mark.parametrize("n_first", [0, 3, 4])
def test_appending_beyond_a_run_is_a_bug_that_is_named(n_first: int) -> None:
    arena = KvArena(10)
    own, other = SequenceKV(reserved(arena, 4)), SequenceKV(reserved(arena, 6))
    other.append(0, *rows(0, 6, 1))
    if n_first:
        own.append(0, *rows(0, n_first, 0))
    before = [part.clone() for part in arena.layer(0)]
    with pytest.raises(EngineError, match=r"token 5 .* reserved keys and values for 4"):
        own.append(0, *rows(0, 5 - n_first, 2))
    assert own.length(0) == n_first
    assert all(torch.equal(a, b) for a, b in zip(arena.layer(0), before, strict=True))


@pytest.mark.parametrize("in_arena", [False, True])
def test_truncating_forgets_what_a_failed_step_appended(in_arena: bool) -> None:
    sequence = SequenceKV(reserved(KvArena(9), 9) if in_arena else None)
    for layer in SHAPES:
        sequence.append(layer, *rows(layer, 3, 0))
    for layer in list(SHAPES)[:2]:  # the step failed before the last layer
        sequence.append(layer, *rows(layer, 2, 1))
    sequence.truncate(3)
    for layer in SHAPES:
        assert sequence.length(layer) == 3
        sequence.append(layer, *rows(layer, 4, 2))
        for seen, first, later in zip(sequence.view(layer), rows(layer, 3, 0), rows(layer, 4, 2), strict=True):
            assert torch.equal(seen, torch.cat([first, later], dim=-2))
    sequence.truncate(0)
    assert {sequence.length(layer) for layer in SHAPES} == {0}


appends = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from(list(SHAPES)), st.integers(1, 5), st.booleans()), max_size=30
)


@given(appends)
def test_an_arena_s_views_are_those_of_buffers_that_grow(script: list[tuple[int, int, int, bool]]) -> None:
    arena = KvArena(3 * 150)
    in_arena = [SequenceKV(reserved(arena, 150)) for _ in range(3)]
    growing = [SequenceKV() for _ in range(3)]
    for seed, (sequence, layer, n, forgets) in enumerate(script):
        both = in_arena[sequence], growing[sequence]
        one, other = (kept.append(layer, *rows(layer, n, seed)) for kept in both)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        if forgets:
            n_tokens = growing[sequence].length(layer) - 1
            for kept in both:
                kept.truncate(n_tokens)
    for one_sequence, other_sequence in zip(in_arena, growing, strict=True):
        for layer in SHAPES:
            assert one_sequence.length(layer) == other_sequence.length(layer)
            if one_sequence.length(layer):
                for a, b in zip(one_sequence.view(layer), other_sequence.view(layer), strict=True):
                    assert torch.equal(a, b)


def test_buffers_of_its_own_grow() -> None:
    sequence, appended = SequenceKV(), [rows(0, 200, seed) for seed in range(3)]
    sizes = []
    for keys, values in appended:
        seen = sequence.append(0, keys, values)
        sizes.append(sequence.nbytes)
    for part, whole in zip(zip(*appended, strict=True), seen, strict=True):
        assert torch.equal(torch.cat(part, dim=-2), whole)
    assert sequence.length(0) == 600
    assert sizes == [n * 2 * (3 + 4) * 4 for n in (256, 512, 768)]
    sequence.append(1, *rows(1, 1, 0))
    assert sequence.nbytes == sizes[-1] + 256 * 1 * (5 + 2) * 4
    assert sequence.token_bytes == (2 * (3 + 4) + 1 * (5 + 2)) * 4
    sequence.truncate(0)
    assert sequence.nbytes == sizes[-1] + 256 * 1 * (5 + 2) * 4


# Room


class Ledger(RuleBasedStateMachine):
    """Requests come and go; room is never given twice and never lost."""

    @initialize(n_tokens=st.none() | st.integers(1, 20), in_arena=st.booleans())
    def make(self, n_tokens: int | None, in_arena: bool) -> None:
        self.arena = KvArena(n_tokens) if in_arena and n_tokens is not None else None
        self.room = KvRoom(n_tokens, self.arena)
        self.held: list[Reserved] = []

    @rule(n=st.integers(1, 12))
    def reserve(self, n: int) -> None:
        limit = self.room.n_tokens
        n_before = self.room.n_reserved
        if limit is not None and n > limit:
            with pytest.raises(AssertionError):
                self.room.reserve(n)
            return
        found = self.room.reserve(n)
        if found is None:
            assert limit is not None
            assert n_before + n > limit or self.arena is not None
            assert self.held, "there is room for any request when all have left"
            assert self.room.n_reserved == n_before
            return
        assert found.n_tokens == n
        assert (found.run is not None) == (self.arena is not None)
        assert found.run is None or found.run.n_tokens == n
        self.held.append(found)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        left = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.room.release(left)
        with pytest.raises(KeyError):
            self.room.release(left)

    @invariant()
    def the_ledger_agrees(self) -> None:
        self.room.check()
        assert self.room.n_reserved == sum(held.n_tokens for held in self.held)


TestLedger = Ledger.TestCase


# Attention


def ids(n: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(1, 180, (n,), generator=torch.Generator().manual_seed(seed)).tolist())


SCRIPT = Script(
    (
        Visit(ids(40, 1), n_prompt=31, joins=0, leaves=99),
        Visit(ids(12, 2), n_prompt=1, joins=0, leaves=99),
        Visit(ids(15, 3), n_prompt=9, joins=1, leaves=5),
        Visit(ids(20, 4), n_prompt=11, joins=3, leaves=99),
    ),
    chunk_tokens=9,
)
"""Chunks, decoding beside them, one that leaves half done; windows of the models are passed."""
PACKED = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "gemma4")
"""Fused and explicit attention, windows, sinks, latents that are expanded behind the cache, layers of two kinds."""


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Subject]:
    opened: dict[str, Subject] = {}

    def get(name: str) -> Subject:
        if name not in opened:
            folder: Path = tmp_path_factory.mktemp("subject")
            build(name).save_pretrained(folder)
            opened[name] = Subject.open(folder)
        return opened[name]

    return get


@pytest.mark.parametrize("waves", ["one", "two"])
@pytest.mark.parametrize("name", PACKED)
def test_attention_over_an_arena_is_the_same_bit_for_bit(
    name: str, waves: Any, subjects: Callable[[str], Subject]
) -> None:
    placement = Placement(EngineConfig(waves=waves))
    growing = run(subjects(name), SCRIPT, placement)
    arena = KvArena(300)
    reserved(arena, 7)

    def new_past(self: StepRunner, run: Run | None = None) -> SequenceKV:
        return SequenceKV(reserved(arena, 45))

    with patch.object(StepRunner, "new_past", new_past):
        in_arena = run(subjects(name), SCRIPT, placement)
    assert not in_arena.differs_from(growing)
    arena.check()
    assert arena.n_free == 300 - 7 - 4 * 45
    assert all(part[7:].any() and not part[:7].any() for part in arena.layer(0)), "it was written to"
