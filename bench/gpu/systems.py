"""Other systems' rules as options of an engine: one engine, one cache, one set of kernels, other decisions.

What of the originals is not reproduced:

- fiddler-2024 waits for the CPU's experts before it goes on to the GPU's; here they overlap. Its placement goes by
  popularity in another text; here it is uniform: the first experts of every layer. It sums costs in its rule, which
  is reproduced.
- hybrimoe, all-fetch, fiddler-2024 and ktransformers stream experts through buffers of their own; here those pass
  through the cache's slots, of which one in 64 is for experts in passing. Every newcomer stays in their caches;
  here the cache admits by its policy.
- ktransformers runs a decoding step as one CUDA graph whose host functions call the CPU, has AMX kernels with a
  weight layout of their own, places experts by measured frequency, and defers experts; here decoding is recorded in
  pieces, kernels are ours, and nothing is deferred (`cpu-or-stream` streams prompts above a threshold as it does).
- all-cpu keeps no expert on the GPU, as llama.cpp with every expert on the CPU would.
- llama.cpp's whole layers, freetoken and mixtral-offloading are left to `bench/policies.py`; the real llama.cpp is
  `bench.gpu.llama`.
"""

from typing import Any

from fiddler.scheduler.systems import system


def options(name: str) -> dict[str, Any]:
    """Return the options of `EngineConfig` that make an engine decide as a system does. Raises `ConfigError`."""
    placed = system(name)
    chosen: dict[str, Any] = {
        "planner": placed.planner,
        "policy": placed.policy,
        "half_life": placed.half_life,
        "prefetch": placed.prefetch,
        "promote": placed.promote,
        "waves": placed.waves,
    }
    if placed.order == "nobody":
        chosen["slots"] = 0
    return chosen
