"""Architectures whose sequences may share one packed forward, with prompts cut into chunks.

The exactness suite proves every entry: packed steps, ragged and chunked, with sequences joining and leaving, equal
separate unsplit forwards. An architecture that is not listed runs one forward per sequence, whole prompts at once,
with transformers' own cache, and meets the others at the experts.
"""

PACKED: frozenset[str] = frozenset({"mixtral", "qwen3_moe"})
