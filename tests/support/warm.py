"""`fiddler` in processes that are forked where its modules are imported, for imports take seconds.

    python -m tests.support.warm PLACE             # serves at a socket, one process after another
    python tests/support/warm.py PLACE inspect …   # what `fiddler inspect …` does, except on signals

The second hands its standard streams to a child of the first, those that are closed as well, and ends as it does.
"""

import gc
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from subprocess import PIPE, Popen
from tempfile import TemporaryDirectory

STREAMS = ("stdin", "stdout", "stderr")
MOST_BYTES = 1 << 16
"""Of a command's arguments."""
HEAVY = (
    "anyio._backends._asyncio",
    "fiddler.cli.commands",
    "fiddler.engine.engine",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
)
"""What a command imports."""


@contextmanager
def warm(environment: dict[str, str]) -> Iterator[tuple[str, ...]]:
    """Serve, and give the command that takes `fiddler`'s arguments."""
    with TemporaryDirectory() as folder:  # a socket's path may have 107 bytes
        place = f"{folder}/warm"
        command = [sys.executable, "-m", "tests.support.warm", place]
        with Popen(command, cwd=Path(__file__).parents[2], env=os.environ | environment, stdout=PIPE) as server:
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
            try:
                yield sys.executable, "-S", "-E", __file__, place
            finally:
                server.kill()


def ask(place: str, arguments: list[str]) -> int:
    """Return the exit code of a command that has this process's streams."""
    numbers = [number for number in range(len(STREAMS)) if is_open(number)]
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(place)
        socket.send_fds(server, [json.dumps([numbers, arguments]).encode()], numbers)
        return int(server.recv(MOST_BYTES))


def is_open(number: int) -> bool:
    with suppress(OSError):
        os.fstat(number)
        return True
    return False


def asked(place: str) -> list[str]:
    """Serve; return in a child that has the streams of the process which asked, with the arguments."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(place)
        server.listen()
        print("ready", flush=True)
        while True:
            asks, _ = server.accept()
            with asks:
                message, descriptors, *_ = socket.recv_fds(asks, MOST_BYTES, len(STREAMS))
                numbers, arguments = json.loads(message)
                child = os.fork()
                if not child:
                    take(dict(zip(numbers, descriptors, strict=True)))
                    return list(arguments)
                for descriptor in descriptors:
                    os.close(descriptor)
                asks.send(b"%d" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def take(descriptors: dict[int, int]) -> None:
    """Make these the standard streams; a new interpreter has none where a descriptor is closed."""
    for number, stream in enumerate(STREAMS):
        if number in descriptors:
            os.dup2(descriptors[number], number)
            os.close(descriptors[number])
        else:
            os.close(number)
            setattr(sys, stream, None)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(ask(sys.argv[1], sys.argv[2:]))
    for module in HEAVY:
        import_module(module)
    gc.freeze()  # what is collected in no child stays one for all
    from fiddler.cli import app

    sys.argv = ["fiddler", *asked(sys.argv[1])]
    app(prog_name="fiddler")
