"""`fiddler quantize` as a user meets it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fiddler import DEMO
from fiddler.cli import app
from tests.architectures import build

run = CliRunner()


def quantize(*arguments: object) -> tuple[int, str, str]:
    result = run.invoke(app._application, ["quantize", *map(str, arguments)])
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


def test_the_demo_model(tmp_path: Path) -> None:
    code, out, err = quantize(DEMO, tmp_path / "new")
    assert code == 0, err
    assert "4.33 MB, 11.10 MB before" in out
    assert out.count("layer ") == 7
    assert "read by" not in out
    code, out, _ = quantize(DEMO, tmp_path / "new", "--json")
    said = json.loads(out)
    assert (code, said["to"], said["resumed_files"], set(said["error"])) == (0, "int4", 1, set("012345"))
    assert said["written_bytes"] < 0.4 * said["source_bytes"]


def test_what_only_fiddler_reads(tmp_path: Path) -> None:
    build("granitemoe").save_pretrained(tmp_path / "source")
    code, out, err = quantize(tmp_path / "source", tmp_path / "new", "--to", "int8")
    assert code == 0, err
    assert "transformers has this architecture's experts only fused" in " ".join(out.split())
    code, out, _ = quantize(tmp_path / "source", tmp_path / "new", "--to", "int8", "--json")
    assert (code, json.loads(out)["transformers_reads"]) == (0, False)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "Missing argument 'SRC'"),
        ((DEMO,), "Missing argument 'DST'"),
        ((DEMO, DEMO), "error: DST: "),
        ((DEMO, "/dev/null"), "error: DST: /dev/null is not a folder; give another"),
        ((DEMO, "/dev/null/x"), "error: DST: /dev/null/x cannot be written"),
        (("nothing/here/at/all", "new"), "error: nothing/here/at/all is neither"),
        ((DEMO, "new", "--to", "int3"), "'int3' is not one of int4, int8, fp8"),
    ],
    ids=["nothing", "one", "itself", "device", "below-device", "no-source", "no-target"],
)
def test_mistakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[object, ...], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = quantize(*arguments)
    assert code != 0
    assert not out
    assert says in err.replace("│", " ").replace("  ", " ")
