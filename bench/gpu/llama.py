"""llama.cpp beside Fiddler at equal GPU memory: the experts of its first layers on the CPU, the others on the GPU.

llama.cpp reads a GGUF file, so the same random weights go to disk twice on the way; that takes disk and minutes,
and a model of few layers has to do. How many layers' experts stay on the CPU is chosen by what the GPU really has
less free: one load with all of them there says what the rest takes, and each other layer takes its experts' bytes.
Not less than Fiddler had, but by less than a layer.

`--n-cpu-moe` is no option of llama.cpp's library but of its programs, which overrides the memory of these layers'
tensors by their names (llama.cpp, `common/common.h`, `llm_ffn_exps_cpu_override`); so it is done here.
"""

import ctypes
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.gpu.clock import spread
from bench.gpu.context import Context, said
from bench.gpu.models import sizes_of, vocabulary
from bench.gpu.running import prompts
from bench.peers import gguf_file
from bench.peers.llama_cpp import LlamaCppPeer
from bench.peers.peer import installed
from bench.workload import UnavailableError, Workload
from tools import synthesize

NAME = "llama.cpp"
DISK_SHARE = 2.3
"""Of the model's bytes: as a checkpoint, as a GGUF file, and what file systems want."""
NEEDED_S = 420.0
"""To write both files and run."""
EXPERTS = r"blk\.{layer}\.ffn_(up|down|gate|gate_up)_(ch|)exps"
"""Source: `LLM_FFN_EXPS_REGEX` and `llm_ffn_exps_block_regex` in llama.cpp's `common/common.h`."""


class _Override(ctypes.Structure):
    """llama.cpp's `llama_model_tensor_buft_override` (`include/llama.h`)."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p))


def llama(ctx: Context, gpu_bytes: int) -> dict[str, Any]:
    """Run `sizes.llama` with as much of the GPU as Fiddler had. What fails is said under `unavailable`."""
    spec = ctx.sizes.llama
    try:
        folder = synthesize.write(synthesize.config_of(spec), ctx.scratch / "llama")
        file = gguf_file.of(folder)
        shutil.rmtree(folder)
        return {"model": spec, **_measured(ctx, spec, file, gpu_bytes)}
    except Exception as error:  # a foreign library, and disks: Fiddler's own numbers count without it
        return {"model": spec, "rows": [], "unavailable": said(error)}


def why_not(ctx: Context) -> str:
    """Say why llama.cpp cannot run here, before anything is written; empty where it can."""
    try:
        library = installed("llama_cpp", "llama-cpp-python")
    except UnavailableError as error:
        return str(error)
    if not library.llama_supports_gpu_offload():
        return f"llama-cpp-python {library.__version__} was built without CUDA"
    shape = sizes_of(ctx.sizes.llama)
    wanted = DISK_SHARE * (shape.resident_bytes + shape.total_experts * shape.expert_bytes)
    free, left_s = shutil.disk_usage(ctx.scratch).free, ctx.remaining_s()
    if wanted > free:
        return f"its files take {wanted / 1e9:.0f} GB of disk, {free / 1e9:.0f} are free"
    return "" if left_s >= NEEDED_S else f"needs {NEEDED_S:.0f} s, {max(left_s, 0.0):.0f} are left of the run"


def _measured(ctx: Context, spec: str, file: Path, gpu_bytes: int) -> dict[str, Any]:
    shape = sizes_of(spec)
    with _opened(ctx, file, shape.n_layers) as (peer, rest_bytes):
        del peer
    layer_bytes = shape.n_experts * shape.expert_bytes
    n_gpu = min(shape.n_layers, max(0, -(-(gpu_bytes - rest_bytes) // layer_bytes)))
    with _opened(ctx, file, shape.n_layers - n_gpu) as (peer, taken):
        rows = [_row(ctx, spec, peer, n) for n in ctx.sizes.n_sequences]
    return {"n_layers_on_cpu": shape.n_layers - n_gpu, "gpu_bytes": taken, "fiddler_bytes": gpu_bytes, "rows": rows}


def _row(ctx: Context, spec: str, peer: LlamaCppPeer, n: int) -> dict[str, Any]:
    """Decode made-up tokens: its router chooses by its own random weights, as many experts as Fiddler's."""
    sizes, rates = ctx.sizes, list[float]()
    workload = Workload(n, sizes.n_prompt, sizes.n_new, vocabulary(spec))
    for turn in range(sizes.repeats + 1):  # the first warms up
        asked, made = (
            prompts(n, sizes.n_prompt, vocabulary(spec), turn),
            prompts(n, sizes.n_new, vocabulary(spec), -1),
        )
        rate = peer.run(workload, asked, made, sizes.patience_s).decode_tokens_per_s
        if turn and rate is not None:
            rates.append(rate)
    about = {"model": spec, "budget_gib": sizes.llama_gib, "system": NAME, "n_sequences": n}
    return {**about, "n_readings": len(rates), "tokens_per_s": spread(rates)}


@contextmanager
def _opened(ctx: Context, file: Path, n_cpu: int) -> Iterator[tuple[LlamaCppPeer, int]]:
    """Have the model open, the experts of its first `n_cpu` layers on the CPU; yields the GPU memory it took."""
    library: Any = installed("llama_cpp", "llama-cpp-python")
    ctx.shelf.tidy()
    free = ctx.gpu.memory().free
    library.llama_backend_init()
    params, overrides = library.llama_model_default_params(), _overrides(library, n_cpu)
    params.n_gpu_layers = 999
    if hasattr(params, "load_mode"):
        params.load_mode = library.LLAMA_LOAD_MODE_NONE  # as it advises where tensors are on the CPU by their names
    params.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)
    model = library.llama_model_load_from_file(str(file).encode(), params)
    if not model:
        raise UnavailableError(f"llama.cpp {library.__version__} cannot load {file.name}")
    peer = LlamaCppPeer(library, model, torch.get_num_threads())
    try:
        peer.context(max(ctx.sizes.n_sequences), ctx.sizes.n_prompt + ctx.sizes.n_new)
        yield peer, max(free - ctx.gpu.memory().free, 0)
    finally:
        peer.close()


def _overrides(library: Any, n_cpu: int) -> Any:
    """Return an array that ends in an empty entry; it must live until the model is loaded."""
    memory = library.llama_cpp._lib.ggml_backend_cpu_buffer_type
    memory.restype = ctypes.c_void_p
    patterns = [EXPERTS.format(layer=layer).encode() for layer in range(n_cpu)]
    entries = [_Override(pattern, memory()) for pattern in patterns]
    return (_Override * (n_cpu + 1))(*entries, _Override(None, None))
