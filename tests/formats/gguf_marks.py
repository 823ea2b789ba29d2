"""Which tests of GGUF run on this version of transformers."""

import pytest
import transformers

from fiddler.models.gguf_config import NEEDED

needs_tables = pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < NEEDED,
    reason="its tables of GGUF are older",
)
