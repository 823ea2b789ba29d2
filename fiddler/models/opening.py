"""Opens a checkpoint, a folder of safetensors or a GGUF file: its configuration, and its tensors by name."""

from pathlib import Path

from transformers import PretrainedConfig

from fiddler.models.skeleton import read_config
from fiddler.store.checkpoint import Checkpoint
from fiddler.store.gguf_parts import is_gguf


def open_checkpoint(path: Path, *, trust_remote_code: bool = False) -> tuple[PretrainedConfig, Checkpoint]:
    """Return a checkpoint's configuration and its tensors, of which none is read; `path` is from `find_checkpoint`.

    Raises `ModelError`.
    """
    if not is_gguf(path):
        config = read_config(path, trust_remote_code=trust_remote_code)
        return config, Checkpoint.open(path)
    from fiddler.models.gguf_config import gguf_config  # and transformers' tables, which few need
    from fiddler.models.gguf_names import placed
    from fiddler.store.gguf_files import GgufCheckpoint

    file = GgufCheckpoint.open(path)
    config = gguf_config(file)
    return config, placed(file, config)
