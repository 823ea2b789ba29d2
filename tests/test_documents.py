"""Documents say what the result files say, nothing else with a unit, and name the machine it was taken on."""

import json
from pathlib import Path

import pytest

from bench.documents import checker as checking
from bench.documents.checker import Checker, Problem, documents_of
from bench.documents.spans import Document, MarkError
from bench.documents.unbound import unbound
from bench.values import RESULTS, label, load, one, percent, pick, read, span

MACHINE = {"cpu": "Intel(R) Xeon(R) Processor", "n_cores": 2, "isa": ["avx512f", "amx_bf16"]}
LABEL = "2 cores, Intel Xeon with AMX, no GPU"
PLAN = {
    "machine": MACHINE,
    "times": [{"n_loads": 8, "us": 47.1}, {"n_loads": 32, "us": 104.2}],
    "table": "| n |\n|---|\n| 2 |",
}
BOUND = "<!--= {one(plan.times, n_loads=8).us:.0f} us -->47 us<!--/-->"

WITH_UNIT = [
    *("68 tokens/s", "3 tok/s", "12 tokens a second", "15 GB/s", "1 TFLOP/s", "6 GB", "300 MiB", "2 bits per byte"),
    *("0.28 ms", "1,024 us", "47 \N{MICRO SIGN}s", "2 s", "4 times", "2x", "2\N{MULTIPLICATION SIGN}"),
    *("7 %", "5%", "\N{MINUS SIGN}7 %", "0.97", "1.5093"),
]
WITHOUT = [
    *(
        "8 loads",
        "128 experts of 48 layers",
        "2048 \N{MULTIPLICATION SIGN} 768",
        "25 % resident",
        "22 November 2026",
    ),
    *("Python 3.11", "PCIe 4.0", "transformers 5.23.0", "Mixtral-8x7B", "an A100's host"),
    *("`0.5 ms`", "[a](2.5/a.md)"),
]


@pytest.fixture
def checker(tmp_path: Path) -> Checker:
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    (tmp_path / "waves-virtual.json").write_text(json.dumps({"machine": MACHINE, "virtual": True, "gain": 1.1}))
    return Checker(load(tmp_path))


def problems(checker: Checker, text: str, name: str = "a.md") -> list[tuple[int, str]]:
    return [(problem.line, problem.text) for problem in checker.problems(Document(name, text))]


class TestOurs:
    @pytest.mark.parametrize("document", documents_of(), ids=lambda document: document.name)
    def test_documents_say_what_the_files_say(self, document: Document) -> None:
        assert [*map(str, Checker(load()).problems(document))] == []

    def test_readme_and_all_docs_are_held_to_it(self) -> None:
        names = {document.name for document in documents_of()}
        assert names >= {"README.md", "bench/README.md", "docs/policies.md", "docs/scheduling.md"}

    @pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda file: file.name)
    def test_every_result_says_where_it_was_taken(self, file: Path) -> None:
        assert label(read(file))


class TestBound:
    def test_what_agrees_is_no_problem(self, checker: Checker) -> None:
        assert problems(checker, f"On {LABEL} it takes {BOUND}.\n") == []

    def test_a_changed_number_is_reported_with_its_line(self, checker: Checker) -> None:
        text = f"On {LABEL}\nit takes {BOUND.replace('>47', '>46')}.\n"
        assert problems(checker, text) == [(2, "shows '46 us', the results say '47 us'")]

    def test_rewriting_repairs_it_and_does_nothing_more(self, checker: Checker) -> None:
        right = f"On {LABEL} it takes {BOUND}, `{BOUND.replace('47', '0')}`.\n"
        wrong = right.replace("->47", "->0")
        assert checker.rewritten(Document("a.md", wrong)) == right
        assert checker.rewritten(Document("a.md", right)) == right

    def test_how_lines_are_broken_does_not_matter(self, checker: Checker) -> None:
        text = f"On {LABEL} it takes {BOUND.replace('47 ', '47' + chr(10))}.\n"
        assert problems(checker, text) == []
        assert checker.rewritten(Document("a.md", text)) == text

    def test_a_table_stands_between_empty_lines(self, checker: Checker) -> None:
        text = f"On {LABEL}:\n\n<!--= {{plan.table}} -->\n\n<!--/-->\n"
        written = checker.rewritten(Document("a.md", text))
        assert "-->\n\n| n |\n|---|\n| 2 |\n\n<!--/-->" in written
        assert problems(checker, written) == []
        assert problems(checker, written.replace("| 2 |", "| 3 |")) == [
            (3, "shows '| 3 |', the results say '| 2 |'")
        ]

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            ("{plans.x}", "NameError: name 'plans' is not defined"),
            ("{plan.time}", "AttributeError: no 'time' among machine, times, table"),
            ("{one(plan.times, n_loads=9)}", "LookupError: 0 entries have {'n_loads': 9}"),
            ("{plan.times[7]}", "IndexError"),
            ("{plan.times", "SyntaxError"),
        ],
    )
    def test_a_wrong_template_says_what_is_wrong(self, checker: Checker, template: str, message: str) -> None:
        text = f"\nIt takes <!--= {template} -->47<!--/-->.\n"
        ((line, found),) = problems(checker, text)
        assert line == 2
        assert found.startswith(f"`{template}` cannot be evaluated: {message}")
        assert checker.rewritten(Document("a.md", text)) == text

    def test_templates_have_no_builtins_but_a_few(self, checker: Checker) -> None:
        ((_, found),) = problems(checker, "It takes <!--= {open('a.md')} -->47<!--/-->.\n")
        assert "NameError" in found


class TestMarks:
    @pytest.mark.parametrize(
        ("text", "line", "message"),
        [
            ("a\nb <!--= {1} -->1\n", 2, "never ended"),
            ("a\nb <!--/-->\n", 2, "ends nothing"),
            ("a <!--: goal -->\nb <!--= {1} -->1<!--/--><!--/-->\n", 2, "inside that of line 1"),
            ("a <!--: hearsay -->1 ms<!--/-->\n", 1, "'hearsay' is no reason"),
            ("a <!--= {1 --1} -->1<!--/-->\n", 1, "'--'"),
            ("| a <!--= {1 | 2} -->3<!--/--> |\n", 1, "'|'"),
            ("a\n<!--= {1} -->1<!--/--> b\n", 2, "begins a line"),
            ("* <!--= {1} -->1<!--/--> b\n", 1, "begins a line"),
            ("a\n<!--: goal -->\n\n1 ms\n\n<!--/-->\n", 2, "begins a line"),
        ],
    )
    def test_wrong_ones_are_found(self, checker: Checker, text: str, line: int, message: str) -> None:
        ((found, what),) = problems(checker, text)
        assert found == line
        assert message in what

    def test_wrong_ones_keep_a_document_from_being_rewritten(self, checker: Checker) -> None:
        with pytest.raises(MarkError, match="never ended"):
            checker.rewritten(Document("a.md", "b <!--= {1} -->2\n"))

    @pytest.mark.parametrize(
        "text", ["`<!--= {x} -->`", "```\n<!--= {x} -->\n<!--: so -->\n```", "<!-- a note -->"]
    )
    def test_code_and_other_comments_hold_none(self, text: str) -> None:
        assert Document("a.md", text).spans == ()


class TestUnbound:
    @pytest.mark.parametrize(
        "number",
        WITH_UNIT,
    )
    def test_numbers_with_a_unit_or_a_point_are_found(self, number: str) -> None:
        assert [*unbound(Document("a.md", f"One.\n\nIt is **{number}**, or so.\n"))] == [(3, number)]

    @pytest.mark.parametrize(
        "text",
        WITHOUT,
    )
    def test_counts_settings_and_versions_are_not(self, text: str) -> None:
        assert [*unbound(Document("a.md", f"It is {text}, or so.\n"))] == []

    def test_what_is_marked_is_not(self) -> None:
        assert [*unbound(Document("a.md", "It is <!--: goal -->3 ms or 4 ms<!--/--> <!-- 5 ms -->.\n"))] == []

    def test_half_a_range_is(self) -> None:
        assert [*unbound(Document("a.md", "It is 10 to <!--: goal -->60 ms<!--/-->.\n"))] == [(1, "10 to")]

    def test_bare_numbers_below_a_unit_are(self) -> None:
        table = "| n | {} |\n|---|---|\n| 8 | 68 |\n"
        assert [*unbound(Document("a.md", table.format("made, tok/s")))] == [(3, "68")]
        assert [*unbound(Document("a.md", table.format("made")))] == []
        assert [*unbound(Document("a.md", "| ms | a |\n|---|---|\n| 8 | 68 |\n"))] == [(3, "8"), (3, "68")]


class TestMachines:
    def test_the_section_or_one_above_names_it(self, checker: Checker) -> None:
        def text(one: str, two: str, four: str) -> str:
            return f"# One\n\n{one}\n\n## Two\n\n{two}\n\n### Three\n\nIt takes {BOUND}.\n\n## Four\n\n{four}\n"

        assert problems(checker, text(LABEL, "", "")) == []
        assert problems(checker, text("", f"On **2 cores**, Intel\nXeon{LABEL[19:]}:", "")) == []
        ((line, found),) = problems(checker, text("", "", LABEL))
        assert line == 11
        assert found.endswith(f"was taken: {LABEL!r}")

    def test_what_is_virtual_is_called_that(self, checker: Checker) -> None:
        gain = "<!--= {waves_virtual.gain:.1f} times -->1.1 times<!--/-->"
        assert problems(checker, f"In *virtual* time {gain}.\n") == []
        assert problems(checker, f"On {LABEL} {gain}.\n") != []

    def test_a_notebook_s_section_says_so(self, checker: Checker) -> None:
        text = "# One\n\n{} <!--: notebook -->3 ms<!--/-->.\n"
        assert problems(checker, text.format("(*No file.*)"), checking.NOTEBOOK) == []
        assert problems(checker, text.format(""), checking.NOTEBOOK) != []
        assert problems(checker, text.format("(*No file.*)"), "README.md") != []

    def test_labels(self, checker: Checker, tmp_path: Path) -> None:
        file = tmp_path / "other.json"
        for machine, said in (
            (MACHINE | {"gpu": "NVIDIA H100"}, "2 cores, Intel Xeon with AMX, NVIDIA H100"),
            ({"cpu": "AMD EPYC 7B13 64-Core Processor", "n_cores": 8, "isa": []}, "8 cores, AMD EPYC 7B13, no GPU"),
        ):
            file.write_text(json.dumps({"machine": machine}))
            assert label(read(file)) == said
        assert [label(result) for result in checker.results.values()] == ["", LABEL, "virtual time"]


def test_helpers(checker: Checker) -> None:
    times = checker.results["plan"].times
    assert one(times, n_loads=32).us == 104.2
    assert pick([checker.results["plan"]], n_cores=2) == [checker.results["plan"]]
    assert percent(-0.013, 1) == "\N{MINUS SIGN}1.3 %"
    assert percent(0.2, sign="+") == "+20 %"
    assert span([2.0, 1.0, 3.0], ".1f") == "1.0 to 3.0"


def test_the_command(
    checker: Checker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checking, "ROOT", tmp_path)
    monkeypatch.setattr(checking, "load", lambda: checker.results)
    readme = tmp_path / "README.md"
    readme.write_text(f"On {LABEL} it takes {BOUND.replace('>47', '>46')}.\n")
    with pytest.raises(SystemExit) as left:
        checking.main(["--check"])
    assert left.value.code == 1
    assert capsys.readouterr().out == "README.md:1: shows '46 us', the results say '47 us'\n"
    checking.main([])
    assert capsys.readouterr().out == "README.md: rewritten\n"
    checking.main(["--check"])
    checking.main([])
    assert capsys.readouterr().out == ""


def test_a_problem_says_where() -> None:
    assert str(Problem("docs/a.md", 3, "so")) == "docs/a.md:3: so"
