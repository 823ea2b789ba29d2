"""Print every architecture as a markdown table, and the counts."""

from collections.abc import Iterator

import transformers

from .catalogue import Architecture, architectures, excluded, included
from .model import build, stateful


def _row(architecture: Architecture) -> str:
    experts = ", ".join(f"`{name}`" for name in architecture.experts_classes)
    flags = ", ".join(f"`{kind.flags}`" for kind in architecture.experts if kind.flags) or "defaults"
    if architecture.exclusion is not None:
        cells = ["no", architecture.exclusion, ""]
    else:
        auto = ", ".join(f"`{model_type}`" for model_type in architecture.auto_model_types) or "none"
        state = "yes" if stateful(build(architecture.name)) else "no"
        cells = ["yes", f"`{architecture.class_name}`, auto: {auto}", state]
    return f"| {' | '.join([architecture.name, experts, flags, *cells])} |"


def _lines() -> Iterator[str]:
    yield "| architecture | experts | flags | included | class, or the reason | stateful |"
    yield "|---|---|---|---|---|---|"
    yield from (_row(architecture) for architecture in architectures().values())
    yield ""
    yield f"transformers {transformers.__version__}: {len(included())} included, {len(excluded())} excluded"


if __name__ == "__main__":
    print("\n".join(_lines()))
