"""The tables of README and docs, written from the files in `bench/results`: `python -m bench.documents [--check]`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`, each alone on its line. `bench.tables` has them by
name; a line under each says which files it comes from, and where they were made. Prose cites the tables.
"""

import argparse
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.report import RESULTS, label, read
from bench.tables import TABLES

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "bench/README.md", "docs/*.md")
BLOCK = re.compile(r"^(<!-- table: (\S+) -->)\n(?:(?!<!-- ).*\n)*?<!-- end -->$", re.MULTILINE)
MARK = re.compile(r"^<!-- (?:table: .*|end) -->$", re.MULTILINE)


def documents() -> Iterator[Path]:
    """Yield every document that may hold tables."""
    for pattern in DOCUMENTS:
        yield from sorted(ROOT.glob(pattern))


def written(file: Path) -> str:
    """Return a document's text with its tables as the results are now. Raises `ValueError` for wrong marks."""
    text = file.read_text(encoding="utf-8")
    if 2 * len(BLOCK.findall(text)) != len(MARK.findall(text)):
        raise ValueError(f"{file}: <!-- table: NAME --> and <!-- end --> stand in pairs, each alone on its line")
    return BLOCK.sub(lambda found: "\n\n".join((found[1], shown(found[2], file.parent), "<!-- end -->")), text)


def shown(name: str, folder: Path) -> str:
    """Return a table as Markdown, with a line that says where it comes from. Raises `ValueError` for an unknown."""
    if name not in TABLES:
        raise ValueError(f"{name!r} is none of the tables: {', '.join(TABLES)}")
    files, make = TABLES[name]
    header, *rows = make(*map(read, files))
    lines = [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
    links = [f"[{file}.json]({os.path.relpath(RESULTS, folder)}/{file}.json)" for file in files]
    places = dict.fromkeys(label(read(file)) for file in files)
    return "\n".join([*lines, "", f"*From {', '.join(links)}: {' and '.join(places)}.*"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.documents", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a table is not up to date")
    check, stale = parser.parse_args(arguments).check, False
    for file in documents():
        new = written(file)
        if new != file.read_text(encoding="utf-8"):
            stale = True
            if not check:
                file.write_text(new, encoding="utf-8")
            print(f"{file.relative_to(ROOT)}: {'not what the results say' if check else 'written'}")
    raise SystemExit(1 if check and stale else 0)


if __name__ == "__main__":
    main()
