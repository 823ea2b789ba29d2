"""The process that reads prompts: bounded in time and memory, ended with whoever started it, and never missed."""

import gc
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fiddler.errors import EngineClosedError, EngineFailedError, PromptError
from fiddler.text import reading
from fiddler.text.reading import Asking
from fiddler.text.tokenizer import Text
from tests.support.tiny import tiny_tokenizer

MESSAGES = [{"role": "user", "content": "hi"}]
WAIT_S = 30
"""Longest wait for what must happen."""
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def opened() -> Iterator[Callable[..., Text]]:
    """Make texts that are closed at the end."""
    made: list[Text] = []

    def text(template: str = "{{ messages[0].content }}", tokenizer: Any = None) -> Text:
        tokenizer = tokenizer if tokenizer is not None else tiny_tokenizer()
        tokenizer.chat_template = template
        made.append(Text(tokenizer))
        return made[-1]

    yield text
    for text_ in made:
        text_.close()


def server_of(text: Text) -> int:
    """Return the id of the process that reads."""
    server = text._reader._server
    assert server is not None
    return server._process.pid


def workers_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def exists(pid: int) -> bool:
    """Whether a process runs, or is left as a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def until(happened: Callable[[], bool]) -> None:
    ends_s = monotonic() + WAIT_S
    while not happened():
        assert monotonic() < ends_s, "waited too long"
        sleep(0.01)


class TestTemplates:
    @pytest.mark.parametrize(
        "template",
        [
            ENDLESS,
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
            "{% for a in range(99999) %}{{ messages | tojson }}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        ],
        ids=["endless", "exponential", "endless with output"],
    )
    def test_one_that_does_not_end_is_given_up(
        self, template: str, opened: Callable[..., Text], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = opened(template)
        text.start()
        monkeypatch.setattr(reading, "LIMIT_S", 0.3)
        with pytest.raises(PromptError, match="the chat template took too long on this prompt"):
            text.encode(MESSAGES)
        assert text.encode("hi"), "the next prompt is read"

    @pytest.mark.parametrize(
        "template",
        [
            "{{ 'x' * 500000000 }}",
            "{{ messages[0].content * 500000000 }}",
            "{{ 'x'.center(10 ** 10) }}",
            "{{ messages[0].content.ljust(3 * 10 ** 9) }}",
            "{{ '%1000000000d' % 3 }}",
            "{{ '{:1000000000}'.format(1) }}",
            "{% set n = namespace(x='ab') %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
            "{{ ([1] * 10 ** 9) | length }}",
            "{{ messages[0].content.zfill(10 ** 10) }}",
            "{{ 'x' | indent(10 ** 10, true) }}",
        ],
    )
    def test_one_that_takes_all_memory_is_refused(self, template: str, opened: Callable[..., Text]) -> None:
        text = opened(template)
        with pytest.raises(PromptError, match=r"the chat template .*takes more than \d+ MB"):
            text.encode(MESSAGES)
        assert text.encode("hi")

    @pytest.mark.parametrize(
        ("template", "why"),
        [
            ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
            ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
            ("{{", "unexpected"),
            ("{{ messages[7].role }}", "no element 7"),
            ("{{ ''.__class__.__mro__ }}", "unsafe"),
            ("{{ 1 / 0 }}", "division by zero"),
            ("{% include 'x' %}", "no loader"),
        ],
    )
    def test_one_that_raises_is_quoted(self, template: str, why: str, opened: Callable[..., Text]) -> None:
        text = opened(template)
        with pytest.raises(PromptError, match=f"the chat template refused the messages: .*{why}"):
            text.encode(MESSAGES)
        assert text.encode("hi")

    def test_others_are_read_while_one_is_stuck(self, opened: Callable[..., Text]) -> None:
        text = opened("{% if messages[0].content == 'stuck' %}" + ENDLESS + "{% endif %}fine")
        asking, ended = Asking(), []

        def stuck() -> None:
            try:
                text.read([{"role": "user", "content": "stuck"}], None, asking)
            except EngineClosedError as error:
                ended.append(error)

        thread = threading.Thread(target=stuck)
        thread.start()
        for _ in range(20):
            assert text.encode(MESSAGES) == text.encode("fine")
        workers = workers_of(server_of(text))
        asking.give_up()
        thread.join(WAIT_S)
        assert len(ended) == 1
        until(lambda: len(workers_of(server_of(text))) < len(workers))


class TestTokenizers:
    @staticmethod
    def splitting(pattern: str) -> Any:
        letters = Tokenizer(models.BPE({letter: i for i, letter in enumerate("abcdefghij!")}, []))
        letters.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
        return PreTrainedTokenizerFast(tokenizer_object=letters)

    def test_a_pattern_that_explodes_is_refused(self, opened: Callable[..., Text]) -> None:
        text = opened(tokenizer=self.splitting("(a+)+$"))
        with pytest.raises(PromptError, match=r"the tokenizer refused the text: .*retry-limit"):
            text.encode("a" * 40 + "!")
        assert text.encode("ab!") == [0, 1, 10]

    def test_one_that_does_not_end_is_given_up(
        self, opened: Callable[..., Text], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = opened(tokenizer=self.splitting("(?:a|b)*?(?:a|b)*?[cd][ef]"))
        text.start()
        monkeypatch.setattr(reading, "LIMIT_S", 0.3)
        monkeypatch.setattr(reading, "CHARACTER_S", 0.0)
        with pytest.raises(PromptError, match="the tokenizer took too long"):
            text.encode("ab" * 800 + "c")
        assert text.encode("ab!") == [0, 1, 10]

    def test_one_that_takes_all_memory_ends_one_prompt(self, opened: Callable[..., Text]) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace("a", "b" * 1_000_000)
        text = opened(tokenizer=tokenizer)
        with pytest.raises(PromptError, match=r"the tokenizer .*(takes more than|crashed)"):
            text.read("a" * 1000, 512)
        assert text.encode("c")

    def test_one_in_python_is_read_here(self) -> None:
        class Own(PreTrainedTokenizerFast):  # type: ignore[misc]
            def __call__(self, text: str, **options: Any) -> Any:
                if "!" in text:
                    raise SystemExit("no exclamation marks")
                return super().__call__(text.upper(), **options)

        text = Text(Own(tokenizer_object=tiny_tokenizer().backend_tokenizer))
        assert text.encode("a") == [tiny_tokenizer()("A")["input_ids"][0]]
        with pytest.raises(PromptError, match="the tokenizer refused the text: no exclamation marks"):
            text.encode("a!")


class TestProcess:
    def test_closing_ends_it_and_its_workers(self, opened: Callable[..., Text]) -> None:
        text = opened()
        assert text.encode(MESSAGES)
        server = server_of(text)
        (worker,) = workers_of(server)
        text.close()
        assert not exists(server)
        assert not exists(worker)
        with pytest.raises(EngineClosedError):
            text.encode("hi")

    def test_closing_wakes_who_waits(self, opened: Callable[..., Text]) -> None:
        text = opened(ENDLESS)
        text.start()
        server, raised = server_of(text), []

        def ask() -> None:
            try:
                text.encode(MESSAGES)
            except EngineClosedError as error:
                raised.append(error)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        until(lambda: len(text._reader._busy) == 3)
        text.close()
        for thread in threads:
            thread.join(WAIT_S)
        assert len(raised) == 3
        assert not exists(server)

    def test_closing_does_not_wait_for_the_start(self, opened: Callable[..., Text]) -> None:
        for _ in range(5):
            text = opened()
            raised: list[BaseException] = []
            thread = threading.Thread(target=self._note, args=(text.start, raised))
            thread.start()
            text.close()
            thread.join(WAIT_S)
            assert not thread.is_alive()
            assert all(isinstance(error, EngineClosedError) for error in raised)

    @staticmethod
    def _note(work: Callable[[], object], raised: list[BaseException]) -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    def test_one_that_was_killed_is_started_again(self, opened: Callable[..., Text]) -> None:
        text = opened()
        before = text.encode("hi")
        first = server_of(text)
        os.kill(first, signal.SIGKILL)
        until(lambda: Path(f"/proc/{first}/stat").read_text().split()[2] == "Z")
        assert text.encode("hi") == before
        assert server_of(text) != first
        assert not exists(first)

    def test_a_worker_that_was_killed_is_replaced(self, opened: Callable[..., Text]) -> None:
        text = opened()
        before = text.encode("hi")
        (worker,) = workers_of(server_of(text))
        os.kill(worker, signal.SIGKILL)
        until(lambda: not exists(worker))
        assert text.encode("hi") == before

    def test_without_descriptors_the_error_is_typed_and_the_next_prompt_is_read(
        self, opened: Callable[..., Text], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def none_left(*_: object) -> None:
            raise OSError(24, "Too many open files")

        text = opened()
        with monkeypatch.context() as patch:
            patch.setattr(socket, "socketpair", none_left)
            with pytest.raises(EngineFailedError, match=r"cannot be started: .*Too many open files"):
                text.encode("hi")
        assert text.encode("hi")

    def test_without_descriptors_for_a_worker_others_are_read(
        self, opened: Callable[..., Text], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def none_left(*_: object) -> None:
            raise OSError(24, "Too many open files")

        text = opened(ENDLESS)
        text.start()
        server, asking, raised = server_of(text), Asking(), list[BaseException]()
        stuck = threading.Thread(target=self._note, args=(lambda: text.read(MESSAGES, None, asking), raised))
        stuck.start()
        until(lambda: len(text._reader._busy) == 1 and not text._reader._idle)
        with monkeypatch.context() as patch:
            patch.setattr(socket, "socketpair", none_left)
            with pytest.raises(EngineFailedError, match="Too many open files"):
                text.encode("hi")
        assert server_of(text) == server
        assert exists(server)
        assert text.encode("hi")
        assert stuck.is_alive(), "it is being read as before"
        asking.give_up()
        stuck.join(WAIT_S)
        assert [type(error) for error in raised] == [EngineClosedError]

    def test_a_worker_that_cannot_be_forked_is_not_the_prompts_fault(
        self, opened: Callable[..., Text], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = opened()
        with monkeypatch.context() as patch:
            patch.setattr(socket, "send_fds", lambda *_: None)  # its socket closes, as where fork fails
            with pytest.raises(EngineFailedError, match="could not be forked"):
                text.encode("hi")
        assert text.encode("hi")

    @pytest.mark.parametrize("n_kills", [1, 3])
    def test_killed_while_it_reads_it_is_started_again_a_few_times(
        self, n_kills: int, opened: Callable[..., Text], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = opened(ENDLESS)
        monkeypatch.setattr(reading, "LIMIT_S", 1.5)
        text.start()
        raised: list[BaseException] = []
        asked = threading.Thread(target=self._note, args=(lambda: text.encode(MESSAGES), raised))
        asked.start()
        killed: set[int] = set()
        for _ in range(n_kills):
            until(lambda: any(worker._server._process.pid not in killed for worker in tuple(text._reader._busy)))
            killed.add(server_of(text))
            os.kill(server_of(text), signal.SIGKILL)
        asked.join(WAIT_S)
        told = (EngineFailedError, "ended from outside") if n_kills == 3 else (PromptError, "took too long")
        assert [(type(error), told[1] in str(error)) for error in raised] == [(told[0], True)]
        assert text.encode("hi"), "the next prompt is read"

    def test_without_an_interpreter_the_error_is_typed(
        self, opened: Callable[..., Text], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = opened()
        monkeypatch.setattr(sys, "executable", "/no/such/python")
        with pytest.raises(EngineFailedError, match="cannot be started"):
            text.encode("hi")
        assert text.encode([1, 2]) == [1, 2]

    def test_one_that_is_forgotten_ends(self) -> None:
        text = Text(tiny_tokenizer())
        text.encode("hi")
        server = server_of(text)
        del text
        gc.collect()
        assert not exists(server)


PROGRAM = """
import os, shutil, signal, sys, tempfile
sys.path[:0] = [{root!r}]
from tokenizers import Tokenizer, models
from fiddler.text.reading import Question, Reader
letters = Tokenizer(models.BPE({{letter: i for i, letter in enumerate("abchi")}}, [])).to_str()
definition = {{
    "tokenizer": letters, "split_special_tokens": False, "template": "{{{{ messages[0].content }}}}",
    "special_tokens": {{}},
}}
{before}
reader = Reader(lambda: definition)
chat = Question([{{"role": "user", "content": "hi"}}], False, None)
print(len(reader.ask(chat)), reader._server._process.pid, flush=True)
{after}
"""


def program(*flags: str, before: str = "", after: str = "", **options: Any) -> subprocess.Popen[str]:
    """Start a program that asks once, and prints the answer's length and the id of the process that gave it."""
    return subprocess.Popen(
        [sys.executable, *flags, "-c", PROGRAM.format(root=str(ROOT), before=before, after=after)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


FORK = """
if not os.fork():
    sys.exit(0)
os.wait()
reader.ask(chat)
"""


class TestProgram:
    """What a program does, or what is done to it."""

    @pytest.mark.parametrize(
        ("flags", "before", "after"),
        [
            (("-W", "error"), "", ""),
            (("-I",), "", ""),
            (("-P",), "", ""),
            ((), "os.chdir(folder := tempfile.mkdtemp()); shutil.rmtree(folder)", ""),
            ((), "os.close(0)", ""),
            ((), "os.close(0); os.close(2)", ""),
            ((), "", FORK),
            ((), "signal.signal(signal.SIGCHLD, signal.SIG_IGN)", "reader.close()"),
        ],
        ids=["-W error", "-I", "-P", "no cwd", "no stdin", "no stderr", "forks", "ignores children"],
    )
    def test_reads_and_ends_without_a_word(self, flags: tuple[str, ...], before: str, after: str) -> None:
        with program(*flags, before=before, after=after) as run:
            said, wrong = run.communicate(timeout=120)
        assert (run.returncode, wrong) == (0, "")
        n, server = map(int, said.split())
        assert n == 2
        assert not exists(server)

    def test_the_process_ends_with_a_program_that_is_killed(self) -> None:
        with program(after="signal.pause()") as run:
            assert run.stdout is not None
            server = int(run.stdout.readline().split()[1])
            workers = workers_of(server)
            run.kill()
        until(lambda: not exists(server) and not any(map(exists, workers)))

    def test_a_child_that_lives_on_does_not_keep_it(self) -> None:
        after = "child = os.fork()\nif not child:\n    signal.pause()\nprint(child, flush=True)\nsignal.pause()"
        with program(after=after) as run:
            assert run.stdout is not None
            server, child = int(run.stdout.readline().split()[1]), int(run.stdout.readline())
            run.kill()
            until(lambda: not exists(server))
            os.kill(child, signal.SIGKILL)

    def test_ctrl_c_is_not_for_it(self) -> None:
        # It waits inside the block that catches the signal before it says so.
        after = (
            "try:\n    print('waits', flush=True)\n    signal.pause()\n"
            "except KeyboardInterrupt:\n    print(len(reader.ask(chat)), flush=True)"
        )
        with program(after=after, start_new_session=True) as run:
            assert run.stdout is not None
            assert [run.stdout.readline() for _ in range(2)][1] == "waits\n"
            os.killpg(run.pid, signal.SIGINT)
            said, wrong = run.communicate(timeout=60)
        assert (said.strip(), wrong) == ("2", "")
