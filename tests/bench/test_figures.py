"""The pictures of README and docs: each can be drawn, is the same each time, and is shown somewhere."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bench.figures import latency, replay, roofline, sources, style, timeline
from bench.figures.__main__ import FIGURES, FOLDER, main, write
from bench.report import Record
from fiddler.cli.replay import CacheOptions

ROOT = FOLDER.parents[1]
MOST_BYTES = 200_000
IMAGE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")
SPREAD = {"median": 10.0, "low": 9.0, "high": 12.0}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every picture, of shorter simulations and replays than the committed ones."""
    folder = tmp_path_factory.mktemp("figures") / "new"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timeline, "N_PROMPT", 16)
        patch.setattr(timeline, "N_NEW", 6)
        patch.setattr(replay, "CACHE", CacheOptions(policy=["lru", "lfu"], resident=[0.25, 0.5]))
        main(["--output", str(folder)])
    return folder


def documents() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("bench/**/*.md")]


def shown() -> Iterator[tuple[Path, Path]]:
    """Yield every document with each picture it shows."""
    for document in documents():
        for target in IMAGE.findall(document.read_text(encoding="utf-8")):
            if "://" not in target:
                yield document, (document.parent / target).resolve()


def record(value: Mapping[str, Any]) -> Record:
    return Record({key: record(item) if isinstance(item, Mapping) else item for key, item in value.items()})


def test_every_picture_is_drawn_and_no_other(drawn: Path) -> None:
    assert {file.name for file in drawn.iterdir()} == {f"{name}.svg" for name in FIGURES}


@pytest.mark.parametrize("folder", ["new", "committed"])
@pytest.mark.parametrize("name", FIGURES)
def test_a_picture_is_a_whole_svg_of_a_page_s_width(drawn: Path, name: str, folder: str) -> None:
    file = {"new": drawn, "committed": FOLDER}[folder] / f"{name}.svg"
    root = ElementTree.parse(file).getroot()

    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert float(root.attrib["width"].removesuffix("pt")) == pytest.approx(72 * style.WIDTH)
    assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 20
    assert file.stat().st_size < MOST_BYTES


@pytest.mark.parametrize("name", ["latency", "roofline", "systems", "resident"])
def test_a_committed_picture_shows_the_committed_results(drawn: Path, name: str) -> None:
    assert (drawn / f"{name}.svg").read_bytes() == (FOLDER / f"{name}.svg").read_bytes(), "run `make figures`"


@pytest.mark.parametrize("name", ["latency", "roofline"])
def test_the_same_picture_is_the_same_bytes(drawn: Path, tmp_path: Path, name: str) -> None:
    (again,) = write([name], tmp_path)

    assert again.read_bytes() == (drawn / f"{name}.svg").read_bytes()
    assert b"Matplotlib" not in again.read_bytes()


def test_a_png_says_neither_when_nor_by_what_it_was_made(tmp_path: Path) -> None:
    file = style.save(roofline.draw(), tmp_path / "roofline.png")

    assert file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert b"Software" not in file.read_bytes()


def test_only_what_was_named_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--only", "roofline", "latency", "--output", str(tmp_path)])

    assert sorted(file.stem for file in tmp_path.iterdir()) == ["latency", "roofline"]
    assert "roofline.svg" in capsys.readouterr().out


def test_an_unknown_name_is_refused_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "portrait"])
    assert "timeline" in capsys.readouterr().err


def test_every_committed_picture_can_be_drawn_again_and_is_shown() -> None:
    committed = {file.resolve() for file in FOLDER.iterdir()}

    assert committed == {FOLDER / f"{name}.svg" for name in FIGURES}
    assert committed <= {picture for _, picture in shown()}


def test_every_picture_that_is_shown_is_there() -> None:
    assert [f"{document.name}: {picture.name}" for document, picture in shown() if not picture.is_file()] == []


def test_a_machine_without_results_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MEASURED_ON", "abacus")

    with pytest.raises(FileNotFoundError, match="kernels-abacus"):
        roofline.draw()


def test_the_roof_is_the_lower_of_memory_and_matmul() -> None:
    rates = [{"hidden": 8, "intermediate": 4, "n_rows": n, "gbs": SPREAD} for n in (1, 64)]
    report = {**sources.measured("kernels"), "read_ceiling_gbs": 20.0, "experts": [*map(record, rates)]}
    report["gemm_flop_per_s"] = {"median": 0.9e12, "low": 0.8e12, "high": 1e12}
    report["settings"] = {"shapes": {"small": [8, 4]}}

    roof = roofline.Roof.of(record(report))
    assert [roof.at(n) for n in (1, 8, 64)] == [20.0, 160.0, 1000.0]
    assert roofline.by_shape(record(report))["small [8, 4]"][64]["median"] == 640.0
    with style.applied():
        attained, shares = roofline.picture(record(report)).axes
    assert any("1,000 GFLOP/s" in text.get_text() for text in attained.texts)
    assert shares.get_ylabel() == "% of the roof"


def test_who_did_not_run_is_named(tmp_path: Path) -> None:
    rows = [
        {
            "system": "fiddler",
            "scenario": "single",
            "n_sequences": 1,
            "decode_tokens_per_s": SPREAD,
            "unavailable": None,
        },
        {
            "system": "fiddler",
            "scenario": "concurrent",
            "n_sequences": 8,
            "decode_tokens_per_s": SPREAD,
            "unavailable": None,
        },
        {"system": "peer", "scenario": "single", "n_sequences": 1, "unavailable": "not installed"},
    ]
    report = {**sources.measured("latency-demo"), "systems": [*map(record, rows)]}
    with style.applied():
        (axes,) = latency.picture([record(report)]).axes

    assert [label.get_text() for label in axes.get_yticklabels()] == ["peer", "fiddler"]
    assert "did not run" in [text.get_text() for text in axes.texts]
