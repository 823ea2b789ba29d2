"""Command line: make the demo checkpoint from nothing but Debian packages."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tools.demo import corpus, model, report, tokenizer, train, windows
from tools.demo.document import Document

SHIPPED = Path(__file__).resolve().parents[2] / "fiddler" / "demo"
DEFAULT_CACHE = Path.home() / ".cache" / "fiddler-demo"
# A long file adds nothing to the counts of the tokenizer but its share of them.
TOKENIZER_CHARACTERS = 60_000

BUSY_MACHINE = (
    "On a machine that does other work, set OMP_WAIT_POLICY=PASSIVE: a thread that spins at a barrier takes the "
    "core that the thread it waits for could use."
)


def main() -> None:
    """Fetch the text, train, measure and write the checkpoint."""
    options = _options()
    options.cache.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(train.SEED)
    torch.set_num_threads(options.threads)
    text = corpus.load(options.cache)
    vocabulary = _tokenizer(options.cache / "tokenizer", text.training)
    documents = windows.encode_training(vocabulary, text.training)
    print(f"{sum(map(len, documents)):,} tokens a round", flush=True)
    network = model.build(vocabulary)

    def snapshot() -> None:
        tokenizer.save(vocabulary, options.out)
        model.save(network, vocabulary, options.out)

    progress = train.train(network, documents, options.minutes, options.cache / "training.pt", snapshot)
    snapshot()
    report.write(options.out, text, progress, options.cache)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.demo", description=main.__doc__, epilog=BUSY_MACHINE)
    parser.add_argument("--minutes", type=float, default=60, help="training time (default: 60)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument(
        "--cache",
        type=Path,
        default=DEFAULT_CACHE,
        help="folder for packages, the tokenizer and the training state; an interrupted run continues from it",
    )
    parser.add_argument("--out", type=Path, default=SHIPPED, help="folder of the checkpoint")
    return parser.parse_args()


def _tokenizer(folder: Path, documents: list[Document]) -> PreTrainedTokenizerFast:
    if not folder.exists():
        texts = (document.text[:TOKENIZER_CHARACTERS] for document in documents)
        tokenizer.save(tokenizer.train(texts, model.POSITIONS), folder)
    return AutoTokenizer.from_pretrained(folder)


if __name__ == "__main__":
    main()
