"""A checkpoint on the Hugging Face hub: found in the local cache, or downloaded as far as it is needed."""

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from fiddler.errors import CheckpointError, ModelError
from fiddler.store.folder import CONFIG, SINGLE, check_folder, named_weights, promised_files

_ABOUT = ("*.json", "*.jinja", "*.py", "*.txt", "*.model", "*.tiktoken", "tokenizer*")
"""Configuration, tokenizer, chat templates and code: small files."""
_NOT = ("original/*", "onnx/*", "gguf/*", "*/onnx/*", "figures/*", ".*")


def find_on_hub(name: str, revision: str | None = None, *, download: bool = True) -> Path:
    """Return the folder of a hub id's files; nothing is downloaded if the local cache has them all.

    `revision` is a branch, a tag or a commit; `None` is the main branch. Raises `CheckpointError`, and the errors
    of `check_folder`.
    """
    what = name if revision is None else f"{name}@{revision}"
    try:
        kept = Path(huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True))
        check_folder(kept)
    except ModelError as error:
        lacks: Exception = error  # such as the rest of a download that was broken off
    except Exception as error:  # not cached at all
        lacks = error
    else:
        return kept
    if not download and not isinstance(lacks, ModelError):
        raise CheckpointError(
            f"{what} is neither a folder nor in the hub cache, and nothing is downloaded here: fetch it with "
            f"`hf download {name}{'' if revision is None else f' --revision {revision}'}` first"
        ) from lacks
    if not download:
        raise CheckpointError(f"{what} is neither a folder nor whole in the hub cache: {lacks}") from lacks
    try:
        folder = _download(name, revision)
    except ModelError:
        raise
    except Exception as error:
        raise _not_downloaded(what, error, lacks) from error
    check_folder(folder)
    return folder


def _download(name: str, revision: str | None) -> Path:
    """Download the small files first: they say which of the large ones are the checkpoint."""

    def fetch(*patterns: str) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(_NOT)
            )
        )

    folder = fetch(*_ABOUT)
    if (folder / CONFIG).is_file() and named_weights(folder) is None:
        folder = fetch(SINGLE)  # it wins over an index
    missing = [file for file in promised_files(folder) if not file.is_file()]
    return fetch(*(file.relative_to(folder).as_posix() for file in missing)) if missing else folder


def _not_downloaded(what: str, error: Exception, lacks: Exception) -> CheckpointError:
    match error:
        case GatedRepoError():
            return CheckpointError(
                f"{what} is gated: ask for access on its page on the hub, and log in (hf auth login)"
            )
        case RepositoryNotFoundError():
            return CheckpointError(
                f"{what} is no folder here, and on the hub there is none of this name, or it is private: check the "
                "spelling, or log in (hf auth login)"
            )
        case RevisionNotFoundError():
            return CheckpointError(
                f"{what}: the model has no such branch, tag or commit; check the part after the @"
            )
    why = f"{type(error).__name__}: {error}"
    if isinstance(lacks, ModelError):
        return CheckpointError(
            f"{what} is in the hub cache in part ({lacks}); the rest cannot be downloaded: {why}"
        )
    return CheckpointError(f"{what} is no folder, not in the hub cache, and cannot be downloaded: {why}")
