"""The architectures whose experts go through the seam, from the sources of the installed transformers."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

import transformers
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

SEAM = re.compile(
    r"^@use_experts_implementation(?:\((?P<flags>[^)]*)\))?\n(?:@.*\n)*class (?P<name>\w+)", re.MULTILINE
)
TASK_CLASS = re.compile(r"^class (?P<name>\w+For[A-Z]\w+)\(", re.MULTILINE)


@dataclass(frozen=True)
class Experts:
    """One experts class and the flags its decorator sets, as written (`""`: the defaults)."""

    class_name: str
    flags: str


@dataclass(frozen=True)
class Architecture:
    """One class of a `transformers.models` package that makes text with experts behind the seam.

    A package whose causal LM has a multimodal model around it is two: `name` and `name_multimodal`.
    """

    name: str
    package: str
    module: str
    experts: tuple[Experts, ...]
    class_name: str | None
    task_classes: tuple[str, ...]

    @property
    def experts_classes(self) -> tuple[str, ...]:
        """The names of the experts classes."""
        return tuple(experts.class_name for experts in self.experts)

    @property
    def auto_model_types(self) -> tuple[str, ...]:
        """The model types for which transformers' auto classes give this class; empty: it must be named."""
        mappings = (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
        given = (model_type for names in mappings for model_type, name in names.items() if name == self.class_name)
        return tuple(dict.fromkeys(given))

    @property
    def exclusion(self) -> str | None:
        """Why no model is built, or `None` where one is."""
        if self.class_name is None:
            return f"makes no text token by token: only {', '.join(self.task_classes) or 'models without a head'}"
        return None

    def model_class(self) -> type[PreTrainedModel]:
        """Import the class."""
        if self.class_name is None:
            raise LookupError(f"{self.name} is excluded: {self.exclusion}")
        model_class: type[PreTrainedModel] = getattr(import_module(self.module), self.class_name)
        return model_class


def _scan() -> Iterator[Architecture]:
    models = Path(transformers.__file__).parent / "models"
    for source in sorted(models.glob("*/modeling_*.py")):
        text = source.read_text(encoding="utf-8")
        experts = tuple(Experts(match["name"], match["flags"] or "") for match in SEAM.finditer(text))
        if experts:
            yield from _classes(source, experts, tuple(match["name"] for match in TASK_CLASS.finditer(text)))


def _classes(source: Path, experts: tuple[Experts, ...], tasks: tuple[str, ...]) -> Iterator[Architecture]:
    package = source.parent.name
    mapped = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()
    causal = [task for task in tasks if task.endswith("ForCausalLM")]
    multimodal = [task for task in tasks if task.endswith("ForConditionalGeneration") and task in mapped]
    if len(causal) > 1 or len(multimodal) > 1:
        raise LookupError(f"{source.name} has several classes that make text: {causal}, {multimodal}")
    names = [package, f"{package}_multimodal"]
    module = f"transformers.models.{package}.{source.stem}"
    for name, class_name in zip(names, [*causal, *multimodal] or [None], strict=False):
        yield Architecture(name, package, module, experts, class_name, tasks)


@cache
def architectures() -> dict[str, Architecture]:
    """Every architecture whose experts go through the seam, by name, in alphabetical order."""
    found: dict[str, Architecture] = {}
    for architecture in _scan():
        if architecture.name in found:
            raise LookupError(f"{architecture.name} has two modeling files with experts")
        found[architecture.name] = architecture
    return found


def included() -> tuple[str, ...]:
    """The names `build` accepts, in alphabetical order."""
    return tuple(name for name, architecture in architectures().items() if architecture.exclusion is None)


def excluded() -> dict[str, str]:
    """The architectures that are not built, with the reason."""
    reasons = ((name, architecture.exclusion) for name, architecture in architectures().items())
    return {name: reason for name, reason in reasons if reason is not None}
