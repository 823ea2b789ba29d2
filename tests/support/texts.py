"""Tokenizers of several families, built here, and what a decoder makes of their tokens."""

from collections.abc import Sequence
from functools import cache

from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fiddler.text.tokenizer import Text
from tests.support.tiny import tiny_tokenizer

CORPUS = [
    "the quick brown fox jumps over the lazy dog, the end of the story",
    "naïve café, déjà vu — 日本語の文章, 中文句子, 😀😃😄 and 👩‍👩‍👧 families",
    "def stop(self): return self.stopped  # STOP the stopping",
]
ALPHABET = "abst é\u0301日本😀👩\u200d\ufe0f\n<|>STOP"
# Without U+FFFD, which is what a decoder says for half a character.
characters = st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")
texts = st.one_of(st.text(alphabet=ALPHABET, max_size=30), st.text(alphabet=characters, max_size=12))


@cache
def trained() -> Text:
    """A byte-level BPE whose tokens are pieces of words, and parts of characters that are rare."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS * 3, trainer)
    return Text(PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>"))


@cache
def bytewise() -> Text:
    """A token a byte, with a chat template."""
    return Text(tiny_tokenizer())


@cache
def spaced() -> Text:
    """A tokenizer as Llama's: words carry their leading space, and the first space of a text is dropped."""
    vocabulary = ["<unk>", "▁one", "▁two", ",", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(vocabulary)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Text(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


def _pieces() -> list[str]:
    words = ["▁one", "▁two", "▁", "ing", ",", "é", "日", "��", "<", "n't", "'", ".", " x", "▁▁▁"]
    return ["<unk>", "<s>", "</s>", *words, *(f"<0x{i:02X}>" for i in range(256))]


def _finished(tokenizer: Tokenizer, **options: object) -> Text:
    return Text(PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **options))


@cache
def gemma() -> Text:
    """Pieces and bytes as Gemma's: no space of a text is dropped."""
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(_pieces())}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _finished(tokenizer)


@cache
def llama() -> Text:
    """Pieces and bytes as Llama's, with special tokens."""
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(_pieces())}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _finished(tokenizer)


@cache
def unigram() -> Text:
    """Pieces as T5's, and bytes."""
    tokenizer = Tokenizer(models.Unigram([(p, -1.0) for p in _pieces()], unk_id=0, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return _finished(tokenizer)


@cache
def wordpiece(*, cleans: bool = True) -> Text:
    """Words and their endings as BERT's; spaces before punctuation are taken out."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *"nabc.,!?'",
        "##ing",
        "##n",
        "##'",
        "do",
        "t",
        "'t",
        "n't",
        "s",
        "ve",
        "re",
        "m",
    ]
    tokenizer = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.decoder = decoders.WordPiece(cleanup=not cleans)
    return _finished(tokenizer, clean_up_tokenization_spaces=cleans)


@cache
def suffixed() -> Text:
    """Words that carry their end, as GPT-1's."""
    pieces = ["<unk>", "<s>", "</s>", "a", "b", "a</w>", "b</w>", "ing</w>", ".</w>"]
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], end_of_word_suffix="</w>"))
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    return _finished(tokenizer)


def dirty() -> Text:
    """The words of `wordpiece`, with a decoder that takes the spaces out itself."""
    return wordpiece(cleans=False)


FAMILIES = (trained, bytewise, spaced, gemma, llama, unigram, wordpiece, dirty, suffixed)


def ids_of(text: Text, words: str) -> list[int]:
    assert text.tokenizer is not None
    return list(text.tokenizer(words, add_special_tokens=False)["input_ids"])


def whole(text: Text, ids: Sequence[int]) -> str:
    """Decode at once what a decoder is given piece by piece."""
    assert text.tokenizer is not None
    return text.tokenizer.decode(ids, skip_special_tokens=True)


def stream(text: Text, ids: Sequence[int], prompt: Sequence[int] = (), stops: Sequence[str] = ()) -> list[str]:
    """Return what came out with each token, and what was held back at the end; ends at a stop string."""
    decoder = text.decoder(prompt, stops)
    pieces = []
    for token in ids:
        piece, stopped = decoder.push(token)
        pieces.append(piece)
        if stopped:
            break
    return [*pieces, decoder.flush()]
