"""Options are checked where they are given, and errors are what their tree says."""

import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fiddler
from fiddler import errors, lab
from fiddler.config import (
    KV_TOKENS,
    DeviceKind,
    DtypeName,
    EngineConfig,
    ExpertDtype,
    KernelMode,
    PlannerName,
    PolicyName,
    PrefetchMode,
    Resolved,
    StoreMode,
    WaveMode,
    cache_folder,
    default_kv_tokens,
    most_threads,
    resolve,
)
from fiddler.errors import ConfigError, FiddlerError
from fiddler.lab.policies import POLICIES
from fiddler.lab.systems import PLANNERS, PREFETCH
from tests.support.covering import spread

COUNTS = ("max_running", "chunk_tokens", "max_context", "threads", "vram_budget", "kv_tokens")
COUNTS_FROM_ZERO = ("slots", "defer")
FLAGS = ("promote", "graphs", "trace", "record", "trust_remote_code")
PATHS = ("warm_start", "calibration_dir")
CHOICES = {
    "dtype": DtypeName,
    "expert_dtype": ExpertDtype,
    "kernels": KernelMode,
    "store": StoreMode,
    "policy": PolicyName,
    "planner": PlannerName,
    "prefetch": PrefetchMode,
    "waves": WaveMode,
}
KINDS = (tuple(CHOICES), COUNTS + COUNTS_FROM_ZERO, FLAGS, PATHS, ("half_life",), ("device",))
"""Options whose values are read alike."""
DEVICES = ("auto", "cpu", "cuda", "sim", "sim:rtx4090-desktop", "sim:./a/file.json", "sim:C:\\machine.json")


class Odd:
    """An object of a caller's whose methods raise."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("not to be compared")

    def __repr__(self) -> str:
        raise RuntimeError("not to be shown")


class TestEngineConfig:
    def test_without_options_is_valid(self) -> None:
        assert EngineConfig() == EngineConfig.from_mapping({})

    @pytest.mark.parametrize(
        ("name", "value"), [*product(COUNTS, [0]), *spread([COUNTS], [-1, 1.5, "4", True, [1]])], ids=repr
    )
    def test_counts_must_be_whole_and_positive(self, name: str, value: Any) -> None:
        with pytest.raises(ConfigError, match=f"^{name}={re.escape(repr(value))} must be a whole number"):
            EngineConfig(**{name: value})

    def test_a_count_too_large_is_told_the_most(self) -> None:
        with pytest.raises(ConfigError, match=f"^max_running={2**63} must be at most {2**63 - 1}$"):
            EngineConfig(max_running=2**63)

    @pytest.mark.parametrize("name", COUNTS)
    def test_one_is_enough(self, name: str) -> None:
        assert getattr(EngineConfig(**{name: 1}), name) == 1  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("name", "value"),
        [*product(COUNTS_FROM_ZERO, [-1]), *spread([COUNTS_FROM_ZERO], [0.5, "4", False, [1]])],
        ids=repr,
    )
    def test_some_counts_must_be_whole_and_not_negative(self, name: str, value: Any) -> None:
        with pytest.raises(
            ConfigError, match=f"^{name}={re.escape(repr(value))} must be a whole number of at least 0"
        ):
            EngineConfig(**{name: value})

    @pytest.mark.parametrize("name", COUNTS_FROM_ZERO)
    def test_of_some_none_is_enough(self, name: str) -> None:
        assert getattr(EngineConfig(**{name: 0}), name) == 0  # type: ignore[arg-type]

    @pytest.mark.parametrize("name", ["max_context", "threads", "slots", "vram_budget", "kv_tokens"])
    def test_some_counts_may_be_left_open(self, name: str) -> None:
        assert getattr(EngineConfig(**{name: None}), name) is None  # type: ignore[arg-type]

    @pytest.mark.parametrize("name", ["max_running", "chunk_tokens", "defer"])
    def test_others_may_not(self, name: str) -> None:
        with pytest.raises(ConfigError, match=f"^{name}=None must be a whole number"):
            EngineConfig(**{name: None})

    @pytest.mark.parametrize(
        ("name", "value"),
        spread([[*COUNTS, *COUNTS_FROM_ZERO]], [np.int64(3), np.uint8(3), np.array(3), torch.tensor(3)]),
        ids=repr,
    )
    def test_whole_numbers_of_every_make(self, name: str, value: Any) -> None:
        assert type(getattr(EngineConfig(**{name: value}), name)) is int
        assert EngineConfig(**{name: value}) == EngineConfig(**{name: 3})  # type: ignore[arg-type]

    def test_every_option_is_of_a_kind(self) -> None:
        assert sorted(name for names in KINDS for name in names) == sorted(f.name for f in fields(EngineConfig))

    @pytest.mark.parametrize(
        ("name", "value"),
        spread(
            [names for names in KINDS if names != PATHS],
            [Odd(), [], {}, object(), 10**400, np.zeros(2), np.array(["lru", "lru"]), Path("cpu")],
        ),
        ids=lambda value: value if isinstance(value, str) else str(type(value)),
    )
    def test_nothing_that_is_no_value_raises_anything_else(self, name: str, value: Any) -> None:
        with pytest.raises(ConfigError, match=f"^{name}="):
            EngineConfig(**{name: value})

    @pytest.mark.parametrize(("name", "value"), spread([CHOICES], ["nonsense", "", None, 3, "AUTO"]), ids=repr)
    def test_choices_are_named_with_the_option(self, name: str, value: Any) -> None:
        with pytest.raises(ConfigError, match=f"^{name}={value!r} is not one of '{get_args(CHOICES[name])[0]}', "):
            EngineConfig(**{name: value})

    @pytest.mark.parametrize(("name", "value"), [(n, v) for n, kind in CHOICES.items() for v in get_args(kind)])
    def test_every_choice_is_admitted(self, name: str, value: Any) -> None:
        assert getattr(EngineConfig(**{name: value}), name) == value

    def test_every_choice_is_tested(self) -> None:
        assert {f.name for f in fields(EngineConfig) if get_origin(f.type) is Literal} == set(CHOICES)

    @pytest.mark.parametrize(
        ("name", "value", "where"),
        [
            *(
                ("policy", v, "simulate and fiddler replay")
                for v in sorted(set(POLICIES) - set(get_args(PolicyName)))
            ),
            *(("planner", v, "simulate") for v in sorted(set(PLANNERS) - set(get_args(PlannerName)))),
            *(("prefetch", v, "simulate") for v in sorted(set(PREFETCH) - set(get_args(PrefetchMode)))),
        ],
    )
    def test_what_is_only_compared_is_refused_with_where_it_is(self, name: str, value: Any, where: str) -> None:
        with pytest.raises(ConfigError, match=f"^{name}={value!r} is not one of .*; fiddler {where} ha"):
            EngineConfig(**{name: value})

    @pytest.mark.parametrize("value", [0, 0.0, -1.0, float("nan"), float("inf"), "32", None, True, [1]], ids=repr)
    def test_a_half_life_is_a_number_above_zero(self, value: Any) -> None:
        with pytest.raises(
            ConfigError, match=f"^half_life={re.escape(repr(value))} must be a number of tokens above"
        ):
            EngineConfig(half_life=value)

    @pytest.mark.parametrize("value", [0.01, 1, 1e6, np.float32(2), Fraction(1, 2)], ids=repr)
    def test_a_half_life_may_be_short_or_long(self, value: Any) -> None:
        assert EngineConfig(half_life=value).half_life == value

    @pytest.mark.parametrize(("name", "value"), spread([FLAGS], ["no", "false", 0, 1, None]), ids=repr)
    def test_flags_are_true_or_false(self, name: str, value: Any) -> None:
        with pytest.raises(ConfigError, match=f"^{name}={value!r} must be True or False"):
            EngineConfig(**{name: value})

    @pytest.mark.parametrize("name", FLAGS)
    @pytest.mark.parametrize("value", [True, False])
    def test_both_settings_of_a_flag(self, name: str, value: bool) -> None:
        assert getattr(EngineConfig(**{name: value}), name) is value  # type: ignore[arg-type]
        assert getattr(EngineConfig(**{name: np.bool_(value)}), name) is value

    @pytest.mark.parametrize("name", PATHS)
    @pytest.mark.parametrize("value", [3, False, "", b"file", "a\0b", object], ids=repr)
    def test_paths_are_paths(self, name: str, value: Any) -> None:
        with pytest.raises(ConfigError, match=f"^{name}={re.escape(repr(value))} must be a path"):
            EngineConfig(**{name: value})

    @pytest.mark.parametrize("name", PATHS)
    @pytest.mark.parametrize("value", [Odd(), {"a": Odd()}, 10**5000, 10**400], ids=type)
    def test_what_is_no_path_is_shown_in_short(self, name: str, value: Any) -> None:
        with pytest.raises(ConfigError, match=rf"^{name}=.{{,90}} must be a path"):
            EngineConfig(**{name: value})

    @pytest.mark.parametrize("name", PATHS)
    def test_a_path_may_be_spelled_in_any_way(self, name: str) -> None:
        class Elsewhere:
            def __fspath__(self) -> str:
                return "a/file"

        for value in ("a/file", Path("a/file"), Elsewhere()):
            found = getattr(EngineConfig(**{name: value}), name)  # type: ignore[arg-type]
            assert found == Path("a/file")
            assert isinstance(found, Path)

    @pytest.mark.parametrize("value", DEVICES)
    def test_devices(self, value: str) -> None:
        assert EngineConfig(device=value).device == value

    @pytest.mark.parametrize(
        "value",
        [
            "",
            "gpu",
            "cuda:0",
            "cuda:",
            "CPU",
            "sim:",
            ":",
            ":sim",
            "cpu:",
            "cpu:x",
            "auto:x",
            " sim",
            None,
            3,
            ["cpu"],
        ],
        ids=repr,
    )
    def test_other_devices_are_refused_beside_those_there_are(self, value: Any) -> None:
        known = "'auto', 'cpu', 'cuda', 'sim', 'sim:MACHINE'"
        with pytest.raises(ConfigError, match=f"^device={re.escape(repr(value))} is not one of {known}$"):
            EngineConfig(device=value)

    def test_threads_that_no_machine_could_start_are_refused(self) -> None:
        most = most_threads()
        assert EngineConfig(threads=most).threads == most
        for threads in (most + 1, 32768, 2**31, 2**63, 10**30):
            with pytest.raises(ConfigError, match=f"^threads={threads} must be at most {most}"):
                EngineConfig(threads=threads)

    @pytest.mark.parametrize("device", ["auto", "cuda"])
    def test_a_budget_is_of_gpu_memory(self, device: str) -> None:
        assert EngineConfig(device=device, vram_budget=2**30).vram_budget == 2**30

    @pytest.mark.parametrize("device", ["cpu", "sim", "sim:rtx4090-desktop"])
    def test_a_budget_without_a_gpu_is_refused(self, device: str) -> None:
        with pytest.raises(ConfigError, match=f"^vram_budget=5 is GPU memory, .* device='{device}' does not use"):
            EngineConfig(device=device, vram_budget=5)

    def test_unknown_options_are_named_beside_the_known(self) -> None:
        with pytest.raises(
            ConfigError, match=r"unknown option cache_size, max_runing; known: device, .*max_running"
        ):
            EngineConfig.from_mapping({"max_runing": 3, "cache_size": 2, "threads": 1})

    @pytest.mark.parametrize("options", [None, 5, "cpu", [("threads", 1)], Odd()], ids=type)
    def test_from_mapping_takes_nothing_but_mappings(self, options: Any) -> None:
        with pytest.raises(ConfigError, match=r"^options=.* must be a mapping"):
            EngineConfig.from_mapping(options)

    def test_from_mapping_takes_every_field(self) -> None:
        config = EngineConfig(
            device="cuda",
            dtype="float32",
            expert_dtype="int4",
            max_running=3,
            chunk_tokens=5,
            max_context=7,
            threads=2,
            kernels="linear",
            store="packed",
            slots=0,
            vram_budget=2**33,
            kv_tokens=99,
            policy="lru",
            half_life=8.0,
            promote=False,
            graphs=False,
            planner="all-fetch",
            prefetch="off",
            waves="two",
            defer=1,
            warm_start=Path("scores"),
            trace=True,
            record=True,
            calibration_dir=Path("x"),
            trust_remote_code=True,
        )
        options = {f.name: getattr(config, f.name) for f in fields(config)}
        default = EngineConfig()
        assert [name for name, value in options.items() if value == getattr(default, name)] == []
        assert EngineConfig.from_mapping(options) == config

    def test_from_mapping_checks_values(self) -> None:
        with pytest.raises(ConfigError, match=r"^max_running=0 "):
            EngineConfig.from_mapping({"max_running": 0})

    def test_is_frozen(self) -> None:
        with pytest.raises(FrozenInstanceError):
            EngineConfig().threads = 2  # type: ignore[misc]

    def test_takes_no_positional_options(self) -> None:
        with pytest.raises(TypeError):
            EngineConfig("cpu")  # type: ignore[misc]

    def test_its_errors_are_value_errors_too(self) -> None:
        with pytest.raises(ValueError, match="max_running"):
            EngineConfig(max_running=0)


class TestCacheFolder:
    def test_is_where_the_user_s_caches_are(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
        assert cache_folder() == tmp_path / "caches" / "fiddler"
        monkeypatch.setenv("XDG_CACHE_HOME", "")
        assert cache_folder() == tmp_path / "home" / ".cache" / "fiddler"

    @pytest.mark.parametrize("room", [True, False])
    def test_of_a_user_without_a_home_lasts_as_long_as_the_process(
        self, room: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        code = (
            "import pwd, tempfile; import fiddler.config as config\n"
            f"pwd.getpwuid = {{}}.__getitem__; tempfile.tempdir = {str(tmp_path if room else tmp_path / 'no')!r}\n"
            "folder = config.cache_folder(); assert config.cache_folder() == folder\n"
            "print(folder, folder.is_dir() and oct(folder.stat().st_mode)[-3:])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        folder, mode = done.stdout.split()
        assert mode == ("700" if room else "False")
        assert not Path(folder).exists()
        assert Path(folder).is_relative_to(tmp_path) == room


class TestResolve:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_auto_is_the_checkpoints_own_dtype(self, dtype: Any) -> None:
        resolved = resolve(EngineConfig(), checkpoint_dtype=dtype, model_context=64)
        assert resolved == Resolved(
            device="cpu", machine=None, dtype=dtype, max_context=64, store="mapped", kv_tokens=None
        )

    @pytest.mark.parametrize(
        ("asked", "device", "machine", "store"),
        [
            ("cpu", "cpu", None, "mapped"),
            ("sim", "sim", None, "packed"),
            ("sim:rtx4090-desktop", "sim", "rtx4090-desktop", "packed"),
            ("sim:./a/file.json", "sim", "./a/file.json", "packed"),
            ("sim:C:\\machine.json", "sim", "C:\\machine.json", "packed"),
        ],
    )
    @pytest.mark.parametrize("has_cuda", [False, True])
    def test_a_device_says_its_machine_and_its_store(
        self, asked: str, device: Any, machine: str | None, store: Any, has_cuda: bool
    ) -> None:
        config = EngineConfig(device=asked)
        resolved = resolve(config, checkpoint_dtype="float32", model_context=64, has_cuda=has_cuda)
        assert resolved == Resolved(device, machine, "float32", 64, store, None)

    @pytest.mark.parametrize("asked", ["auto", "cuda"])
    def test_a_gpu_is_used_where_there_is_one(self, asked: str) -> None:
        config = EngineConfig(device=asked, vram_budget=2**30)
        resolved = resolve(config, checkpoint_dtype="float32", model_context=64, has_cuda=True)
        assert resolved == Resolved("cuda", None, "float32", 64, "packed", 64)

    def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused(self) -> None:
        for options in ({}, {"has_cuda": False}):
            config = EngineConfig(vram_budget=2**30)
            resolved = resolve(config, checkpoint_dtype="float32", model_context=64, **options)
            assert resolved == Resolved("cpu", None, "float32", 64, "mapped", None)
            with pytest.raises(ConfigError, match=r"^device='cuda': torch sees no CUDA device; set device='cpu'"):
                resolve(EngineConfig(device="cuda"), checkpoint_dtype="float32", model_context=64, **options)

    @pytest.mark.parametrize(
        ("device", "max_context", "kv_tokens"),
        [
            ("cuda", 1, 1),
            ("cuda", KV_TOKENS, KV_TOKENS),
            ("cuda", KV_TOKENS + 1, KV_TOKENS),
            ("cpu", 10**6, None),
            ("sim", 10**6, None),
        ],
    )
    def test_a_gpu_has_room_for_one_request_of_the_context_within_limits(
        self, device: DeviceKind, max_context: int, kv_tokens: int | None
    ) -> None:
        assert default_kv_tokens(device, max_context) == kv_tokens
        config = EngineConfig(device=device, max_context=max_context)
        resolved = resolve(config, checkpoint_dtype="float32", model_context=10**6, has_cuda=True)
        assert resolved.kv_tokens == kv_tokens

    @pytest.mark.parametrize("device", ["cpu", "sim", "cuda"])
    @pytest.mark.parametrize(("asked", "longest"), [(63, 63), (64, 64), (65, 64)])
    def test_chosen_room_wins_and_limits_what_can_run(self, device: str, asked: int, longest: int) -> None:
        config = EngineConfig(device=device, kv_tokens=asked)
        resolved = resolve(config, checkpoint_dtype="float32", model_context=64, has_cuda=True)
        assert (resolved.kv_tokens, resolved.max_context, resolved.longest) == (asked, 64, longest)

    @pytest.mark.parametrize(
        ("device", "store"), [("cpu", "mapped"), ("cpu", "packed"), ("auto", "packed"), ("sim", "packed")]
    )
    def test_a_chosen_store_wins(self, device: str, store: Any) -> None:
        config = EngineConfig(device=device, store=store)
        assert resolve(config, checkpoint_dtype="float32", model_context=64).store == store

    @pytest.mark.parametrize(
        ("asked", "device"),
        [("sim", "sim"), ("sim:rtx4090-desktop", "sim"), ("cuda", "cuda"), ("auto", "cuda")],
    )
    def test_a_mapped_store_has_nothing_to_copy_to_an_accelerator(self, asked: str, device: str) -> None:
        config = EngineConfig(device=asked, store="mapped")
        with pytest.raises(ConfigError, match=rf"^store='mapped' .* leave store='auto' with device='{device}'"):
            resolve(config, checkpoint_dtype="float32", model_context=64, has_cuda=True)

    @pytest.mark.parametrize("checkpoint_dtype", ["bfloat16", "float8_e4m3fn"])
    def test_a_chosen_dtype_wins(self, checkpoint_dtype: str) -> None:
        config = EngineConfig(dtype="float32")
        assert resolve(config, checkpoint_dtype=checkpoint_dtype, model_context=64).dtype == "float32"

    def test_a_dtype_that_cannot_be_computed_with_says_what_to_set(self) -> None:
        with pytest.raises(ConfigError, match="'float8_e4m3fn' cannot be computed with; set dtype"):
            resolve(EngineConfig(), checkpoint_dtype="float8_e4m3fn", model_context=64)

    @given(model_context=st.integers(1, 100), asked=st.none() | st.integers(1, 100))
    @settings(deadline=None)
    def test_context_is_what_was_asked_within_the_models(self, model_context: int, asked: int | None) -> None:
        config = EngineConfig(max_context=asked)
        if asked is not None and asked > model_context:
            with pytest.raises(ConfigError, match=f"max_context={asked} is more than the model's {model_context}"):
                resolve(config, checkpoint_dtype="float32", model_context=model_context)
        else:
            resolved = resolve(config, checkpoint_dtype="float32", model_context=model_context)
            assert resolved.max_context == (asked or model_context)

    def test_depends_on_its_arguments_alone(self) -> None:
        first, second = (resolve(EngineConfig(), checkpoint_dtype="float16", model_context=9) for _ in range(2))
        assert first == second


def drawn_tree() -> dict[str, tuple[str, ...]]:
    """Read the tree in the docstring of `errors`: each class and the names of its bases."""
    tree: dict[str, tuple[str, ...]] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"^ {4}(?P<branch>[│├└─ ]*)(?P<name>\w+Error)(?: \((?P<also>\w+)\))?(?:  |$)", line)
        if found is None:
            continue
        depth = len(found["branch"]) // 4
        path = [*path[:depth], found["name"]]
        parent = path[-2] if depth else "Exception"
        tree[found["name"]] = (parent, found["also"]) if found["also"] else (parent,)
    return tree


def real_tree() -> dict[str, tuple[str, ...]]:
    """Return the error classes that are defined, with the names of their bases."""
    classes = [c for c in vars(errors).values() if isinstance(c, type) and c.__module__ == errors.__name__]
    return {c.__name__: tuple(base.__name__ for base in c.__bases__) for c in classes}


class TestErrors:
    def test_the_tree_that_is_drawn_is_the_tree_there_is(self) -> None:
        assert drawn_tree() == real_tree()
        assert len(drawn_tree()) > 5

    @pytest.mark.parametrize("name", real_tree())
    def test_every_error_is_exported_and_documented(self, name: str) -> None:
        assert name in fiddler.__all__
        assert getattr(fiddler, name) is getattr(errors, name)
        assert getattr(errors, name).__doc__

    @pytest.mark.parametrize("name", real_tree())
    def test_the_root_catches_every_error(self, name: str) -> None:
        assert issubclass(getattr(errors, name), FiddlerError)


def test_the_labs_names_are_those_of_its_registries() -> None:
    assert get_args(lab.PolicyName) == tuple(POLICIES)
    assert get_args(lab.PrefetchName) == tuple(PREFETCH)
    assert get_args(lab.PlannerName) == tuple(PLANNERS)
