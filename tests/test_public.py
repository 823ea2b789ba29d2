"""The package's face: what can be imported, what it costs, and that it is described."""

import ast
import inspect
import json
import pkgutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import fiddler
import fiddler.scheduler
from fiddler import types as fiddler_types

HEAVY = ("torch", "transformers", "anyio", "safetensors", "greenlet", "numpy", "huggingface_hub")
MOST_MODULES = 84
"""Of ours that an engine imports."""
PLAIN = [
    "fiddler.types",
    "fiddler.errors",
    "fiddler.config",
    *(module.name for module in pkgutil.walk_packages(fiddler.scheduler.__path__, "fiddler.scheduler.")),
]


def modules(statement: str) -> set[str]:
    """Return what a fresh interpreter has imported after a statement."""
    code = f"import sys, json\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def imported_by(statement: str) -> set[str]:
    """Return which heavy packages a fresh interpreter has loaded after a statement."""
    return modules(statement) & set(HEAVY)


def ours(statement: str) -> set[str]:
    """Return which of our modules a fresh interpreter has loaded after a statement."""
    return {name for name in modules(statement) if name.split(".")[0] == "fiddler"}


class TestNames:
    def test_are_sorted_and_named_once(self) -> None:
        def order(name: str) -> tuple[bool, bool, str]:
            return not name.isupper(), not name[0].isupper(), name

        assert fiddler.__all__ == sorted(set(fiddler.__all__), key=order)

    @pytest.mark.parametrize("name", fiddler.__all__)
    def test_can_be_imported(self, name: str) -> None:
        assert getattr(fiddler, name) is not None

    @pytest.mark.parametrize("name", sorted(fiddler._LAZY))
    def test_lazy_ones_are_public_and_what_they_say(self, name: str) -> None:
        assert name in fiddler.__all__
        assert getattr(fiddler, name).__name__ == name
        assert getattr(fiddler, name) is getattr(fiddler, name)

    def test_unknown_ones_are_an_attribute_error(self) -> None:
        with pytest.raises(AttributeError, match="module 'fiddler' has no attribute 'Motor'"):
            fiddler.Motor  # noqa: B018

    def test_dir_lists_them(self) -> None:
        assert dir(fiddler) == sorted(fiddler.__all__)


class TestImports:
    def test_the_package_alone_imports_nothing_heavy(self) -> None:
        assert imported_by("import fiddler; fiddler.EngineConfig(); dir(fiddler)") == set()

    def test_plans_and_what_is_below_them_import_nothing_heavy(self) -> None:
        assert "fiddler.scheduler.routing" in PLAIN
        assert imported_by(f"import {', '.join(PLAIN)}") <= {"numpy"}

    def test_what_is_imported_would_be_seen(self) -> None:
        assert imported_by("import fiddler.lanes.queues") == {"anyio"}


class TestRooms:
    """What an engine brings: other systems' rules and other devices' code stay where they are."""

    def test_an_engine_brings_what_a_plain_cpu_needs(self) -> None:
        rooms = ours("import fiddler; fiddler.Engine")
        assert not {name for name in rooms if name.startswith(("fiddler.lab", "fiddler.gpu", "fiddler.cli"))}
        assert rooms.isdisjoint({"fiddler.steps.graphs", "fiddler.calibration.dense", "fiddler.scheduler.core"})
        assert len(rooms) <= MOST_MODULES

    def test_the_gpu_s_rooms_do_not_know_the_lab(self) -> None:
        rooms = ours("import fiddler.engine.gpu_assembly")
        assert "fiddler.gpu.streams" in rooms
        assert not {name for name in rooms if name.startswith("fiddler.lab")}

    def test_a_described_machine_is_in_the_lab(self) -> None:
        assert "fiddler.lab" not in ours("import fiddler.engine.sim_assembly")


def documented_values(module: Any) -> set[str]:
    """Return the names of a module that are assigned and followed by a docstring."""
    body = ast.parse(Path(inspect.getfile(module)).read_text()).body
    return {
        target.id
        for assigned, after in pairwise(body)
        if isinstance(assigned, ast.Assign)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
        for target in assigned.targets
        if isinstance(target, ast.Name)
    }


CLASSES = [name for name in fiddler.__all__ if inspect.isclass(getattr(fiddler, name))]
FUNCTIONS = [name for name in fiddler.__all__ if inspect.isfunction(getattr(fiddler, name))]
VALUES = sorted(set(fiddler.__all__) - set(CLASSES) - set(FUNCTIONS))


class TestDocstrings:
    @pytest.mark.parametrize("name", CLASSES)
    def test_of_classes(self, name: str) -> None:
        doc = vars(getattr(fiddler, name)).get("__doc__")
        assert doc
        assert not doc.startswith(f"{name}("), "what dataclass writes by itself"

    @pytest.mark.parametrize("name", FUNCTIONS)
    def test_of_functions(self, name: str) -> None:
        assert getattr(fiddler, name).__doc__

    @pytest.mark.parametrize("name", VALUES)
    def test_of_values(self, name: str) -> None:
        assert name in documented_values(fiddler) | documented_values(fiddler_types)

    @pytest.mark.parametrize("name", [name for name in CLASSES if name != "GenerationConfig"])
    def test_of_public_methods(self, name: str) -> None:
        members = {k: v for k, v in vars(getattr(fiddler, name)).items() if not k.startswith("_")}
        callables = {k: v for k, v in members.items() if inspect.isroutine(v) or isinstance(v, property)}
        assert [k for k, v in callables.items() if not inspect.getdoc(v)] == []
