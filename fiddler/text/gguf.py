"""The tokenizer that a GGUF file describes, made by transformers."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fiddler.errors import CheckpointError

_NONE = (None, "none", "no_vocab")


def gguf_tokenizer(file: Path) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a file whose header was found whole, with its chat template; `None` if it has none.

    `AutoTokenizer` would read the whole header twice more, which takes ten seconds, to choose a class of the same
    words and pieces. Raises `CheckpointError`.
    """
    from transformers.integrations.gguf.reader import read_gguf_metadata

    try:
        metadata, _ = read_gguf_metadata(str(file))
        if metadata.get("tokenizer.ggml.model") in _NONE:
            return None
        tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(
            file.parent, gguf_file=file.name, local_files_only=True
        )
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of the tokenizers library is no `Exception`
        raise CheckpointError(
            f"the tokenizer of {file} cannot be read: {type(error).__name__}: {error}; download the file again, or "
            "give the safetensors version of the model"
        ) from error
    return tokenizer
