"""The architectures whose experts go through the seam, from the sources of the installed transformers."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

import transformers
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

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
    """One `transformers.models` package whose experts go through the seam."""

    name: str
    module: str
    experts: tuple[Experts, ...]
    causal_lm: str | None
    task_classes: tuple[str, ...]

    @property
    def experts_classes(self) -> tuple[str, ...]:
        """The names of the experts classes."""
        return tuple(experts.class_name for experts in self.experts)

    @property
    def auto_model_types(self) -> tuple[str, ...]:
        """The model types for which `AutoModelForCausalLM` gives this causal LM; empty: it must be named."""
        names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
        return tuple(model_type for model_type, class_name in names if class_name == self.causal_lm)

    @property
    def exclusion(self) -> str | None:
        """Why no causal LM is built, or `None` where one is."""
        if self.causal_lm is not None:
            return None
        only = ", ".join(self.task_classes) or "models without a head"
        if self.task_classes and all(task.endswith("ForConditionalGeneration") for task in self.task_classes):
            return f"multimodal, and its text model has no causal LM class of its own: only {only}"
        return f"not a causal LM: only {only}"

    def model_class(self) -> type[PreTrainedModel]:
        """Import the causal LM class."""
        if self.causal_lm is None:
            raise LookupError(f"{self.name} is excluded: {self.exclusion}")
        model_class: type[PreTrainedModel] = getattr(import_module(self.module), self.causal_lm)
        return model_class


def _scan() -> Iterator[Architecture]:
    models = Path(transformers.__file__).parent / "models"
    for source in sorted(models.glob("*/modeling_*.py")):
        text = source.read_text(encoding="utf-8")
        experts = tuple(Experts(match["name"], match["flags"] or "") for match in SEAM.finditer(text))
        if not experts:
            continue
        name = source.parent.name
        task_classes = tuple(match["name"] for match in TASK_CLASS.finditer(text))
        causal = [task for task in task_classes if task.endswith("ForCausalLM")]
        if len(causal) > 1:
            raise LookupError(f"{source.name} has several causal LM classes: {causal}")
        module = f"transformers.models.{name}.{source.stem}"
        yield Architecture(name, module, experts, causal[0] if causal else None, task_classes)


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
