"""The Python standard library, one document a source file."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

from tools.demo.document import Document, Fact
from tools.demo.packages import unpack

PACKAGES = ("libpython3.11-stdlib", "libpython3.11-minimal")
LICENCE = "PSF licence 2.0"

# Tables and generated text rather than programs.
SKIPPED = ("encodings/", "pydoc_data/", "lib2to3/", "_sysconfigdata", "this.py", "html/entities.py", "config-")
LONGEST_ANSWER = 400


def held_out(group: str) -> bool:
    """Say whether a module or package is kept from training."""
    return crc32(group.encode()) % 27 == 4


def documents(cache: Path) -> Iterator[Document]:
    """Yield the files, those under another licence than Python's left out."""
    for package in PACKAGES:
        root = unpack(package, cache) / "usr/lib/python3.11"
        for path in sorted(root.rglob("*.py")):
            name = path.relative_to(root).as_posix()
            # Links lead outside the package (to a folder of another one, or nowhere).
            if name.startswith(SKIPPED) or path.is_symlink():
                continue
            text = path.read_text(encoding="utf-8", errors="replace")
            if len(text) < 400 or _foreign(text):
                continue
            module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            yield Document("python", name, module.split(".")[0], text, tuple(_facts(module, text)))


def _foreign(text: str) -> bool:
    """Say whether a file carries the notice of someone other than the Python Software Foundation."""
    notices = re.findall(r"^.*copyright.*$", text, re.IGNORECASE | re.MULTILINE)
    return any("Python Software Foundation" not in notice for notice in notices)


def _facts(module: str, text: str) -> Iterator[Fact]:
    for node in ast.parse(text).body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        summary = (ast.get_docstring(node) or "").split("\n\n")[0]
        if 20 < len(summary) < LONGEST_ANSWER:
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            yield Fact(kind, f"{module}.{node.name}", " ".join(summary.split()))
