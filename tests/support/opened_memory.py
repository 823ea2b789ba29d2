"""A program that opens a model twice: without measuring its kernels, and with an empty folder of calibrations.

Prints the megabytes that are nobody's file after each, as JSON. Run by `test_soak.py` in a process of its own.
"""

import json
import sys
from pathlib import Path

import anyio

from fiddler import Engine, EngineConfig
from tests.support.loaded_memory import anonymous_mb


async def opened(folder: str, config: EngineConfig) -> float:
    async with Engine(folder, config):
        return anonymous_mb()


async def main(folder: str, empty: str) -> list[float]:
    configs = (EngineConfig(kernels="linear"), EngineConfig(calibration_dir=Path(empty)))
    return [await opened(folder, config) for config in configs]


if __name__ == "__main__":
    print(json.dumps(anyio.run(main, *sys.argv[1:])))
