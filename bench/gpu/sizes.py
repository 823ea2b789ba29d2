"""How much is measured: all of it, or enough to see that everything works."""

from collections.abc import Mapping
from dataclasses import dataclass, field

GIB, MIB = 1 << 30, 1 << 20
SHAPES: Mapping[str, tuple[int, int]] = {
    "qwen3-30b-a3b": (2048, 768),
    "gpt-oss-20b": (2880, 2880),
    "mixtral-8x7b": (4096, 14336),
}
"""(hidden, intermediate) of an expert, by model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of everything that takes time. The defaults are a whole run's."""

    minutes: float = 25.0
    """A run takes no longer, but for what is under way; see `Context.remaining_s`."""
    # What runs: specs of `bench.synthetic.shapes`
    models: tuple[str, ...] = ("mixtral-8x7b", "qwen3-30b-a3b")
    few: str = "qwen3-30b-a3b:layers=8"
    """A model that fits a GPU entirely."""
    llama: str = "qwen3-30b-a3b:layers=12"
    """What llama.cpp runs, for its files have to fit the disk; Fiddler runs it too, within `llama_gib`."""
    llama_gib: float = 6.0
    budgets_gib: tuple[float, ...] = (12.0, 24.0, 48.0)
    systems: tuple[str, ...] = ("fiddler", "all-fetch", "all-cpu", "fiddler-2024", "hybrimoe", "ktransformers")
    kv_tokens: int = 8192
    chunk_tokens: int = 512
    # How long it runs
    n_prompt: int = 32
    n_warm: int = 96
    """Tokens that the only sequence of a warm-up makes, the same for every system; fewer where patience ends."""
    n_new: int = 64
    n_sequences: tuple[int, ...] = (1, 8)
    first_token: tuple[int, ...] = (128, 1024, 4096)
    """Tokens of prompts."""
    rounds: int = 3
    """Turns of every system, if there is time for so many."""
    repeats: int = 2
    """Readings a turn."""
    patience_s: float = 3.0
    """A reading, or a warm-up, ends after so long."""
    # Facts
    read_bytes: int = GIB
    """Of host memory, and of experts on the host."""
    gpu_read_bytes: int = 2 * GIB
    copy_bytes: int = 256 * MIB
    slot_bytes: int = GIB
    """Of experts in slots, that they are read from memory and not from a cache."""
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=lambda: dict(SHAPES))
    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 64, 256)
    """Of each expert; on the host those up to 16."""
    gemm: int = 8192
    launches: int = 1000
    passes: int = 5
    # Checks
    tests: tuple[str, ...] = ("tests/gpu",)
    tests_s: float = 420.0


FULL = Sizes()
QUICK = Sizes(
    minutes=5.0,
    models=("qwen3-30b-a3b:layers=12",),
    few="qwen3-30b-a3b:layers=4",
    llama="qwen3-30b-a3b:layers=4",
    llama_gib=3.0,
    budgets_gib=(8.0,),
    n_warm=48,
    n_new=32,
    first_token=(128, 1024),
    rounds=1,
    patience_s=1.5,
    gpu_read_bytes=GIB,
    shapes={"qwen3-30b-a3b": SHAPES["qwen3-30b-a3b"]},
    rows=(1, 4, 16, 64),
    passes=3,
    tests=("tests/gpu/test_cuda.py", "tests/gpu/test_engine.py"),
    tests_s=120.0,
)
