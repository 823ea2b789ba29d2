"""A program that serves requests of random lengths and watches the memory that is nobody's file.

Prints its megabytes, as JSON, after each third of the requests. Run by `test_soak.py` in a process of its own.
"""

import json
import re
import sys
from pathlib import Path
from random import Random

import anyio

from fiddler import Engine, EngineConfig

N_CLIENTS = 24
MOST_NEW = 2


def anonymous_mb() -> float:
    found = re.search(r"Anonymous:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    assert found is not None
    return int(found[1]) / 1024


async def main(folder: str, n_requests: int, longest: int) -> list[float]:
    random, taken = Random(1), list[float]()
    left = iter(range(1, n_requests + 1))

    async def client(engine: Engine) -> None:
        for number in left:
            prompt = random.choices(range(5, 200), k=random.randint(1, longest))
            await engine.generate(prompt, max_new_tokens=random.randint(1, MOST_NEW), do_sample=False)
            if number % (n_requests // 3) == 0:
                taken.append(anonymous_mb())

    config = EngineConfig(kernels="linear", max_running=N_CLIENTS)
    async with Engine(folder, config) as engine, anyio.create_task_group() as group:
        for _ in range(N_CLIENTS):
            group.start_soon(client, engine)
    return taken


if __name__ == "__main__":
    print(json.dumps(anyio.run(main, sys.argv[1], *map(int, sys.argv[2:]))))
