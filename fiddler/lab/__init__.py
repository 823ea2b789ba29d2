"""Simulates machines, compares policies and systems, and replays recorded routing; the engine does not need it.

Here are only the names that the lab's commands take, apart from what they name: `--help` must not wait for numpy.
The registries hold the same names: `POLICIES` in lab/policies.py, `PREFETCH` and `PLANNERS` in lab/systems.py. A
test compares them.
"""

from typing import Literal

PolicyName = Literal["aged-lfu", "forecast", "hybrimoe", "layer-lru", "lfru", "lfu", "lru", "static"]
PrefetchName = Literal["auto", "off", "look-ahead", "transitions", "frequency", "eager", "impact"]
PlannerName = Literal[
    "auto", "all-cpu", "all-fetch", "bandwidth-split", "cheapest-each", "cpu-or-stream", "two-ended"
]
