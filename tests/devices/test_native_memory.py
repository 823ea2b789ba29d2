"""Our kernels read and write nothing but what is theirs: a sanitizer watches them in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fiddler.devices.library import compiled
from fiddler.devices.native import FLAGS, SOURCE, native

ROOT = Path(__file__).parents[2]
FLAGS_TO_WATCH = ("-O1", "-g1", *FLAGS[1:], "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
BUILDS = {"best": (), "portable": ("-DPORTABLE",)}


@pytest.mark.skipif(native() is None, reason="this machine has no gcc")
def test_odd_shapes_and_hostile_matrices_touch_no_other_memory(tmp_path: Path) -> None:
    libraries = [tmp_path / f"{name}.so" for name in BUILDS]
    try:
        for library, options in zip(libraries, BUILDS.values(), strict=True):
            library.write_bytes(compiled(["cc"], SOURCE, [*FLAGS_TO_WATCH, *options]))
    except subprocess.SubprocessError:
        pytest.skip("this gcc has no sanitizers")
    runtimes = [
        subprocess.check_output(["cc", f"-print-file-name=lib{name}.so"], text=True).strip()
        for name in ("asan", "ubsan")
    ]
    if not all(Path(runtime).is_absolute() for runtime in runtimes):
        pytest.skip("this gcc has no sanitizers")
    environment = os.environ | {
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "2",
    }
    command = [sys.executable, "-m", "tests.devices.hostile_kernels", *map(str, libraries)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == "done\n" * len(libraries)
