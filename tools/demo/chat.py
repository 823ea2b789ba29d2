"""Turn facts into chat text in the format of the chat template."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tools.demo.document import Document, Fact

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)

TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

QUESTIONS = {
    "verse": ("Read me {}", "Read me {}.", "What does {} say?", "Quote {}.", "Please read {}.", "{}"),
    "jargon": ("What is {}?", "What is {} in hacker jargon?", "Define {}.", "Explain {}.", "What's {}?", "{}?"),
    "word": ("What does {} mean?", "Define {}.", "What does the word {} mean?", 'What does "{}" mean?'),
    "function": ("What does {} do?", "What does the Python function {} do?", "Explain {}.", "{}()?"),
    "class": ("What is {}?", "What is the Python class {} for?", "Explain the class {}.", "{}?"),
}
# How many exchanges of each kind; a kind with fewer facts repeats them in other words.
TRAINING_EXCHANGES = {"verse": 6000, "jargon": 7000, "word": 9000, "function": 1500, "class": 1200}
HELD_OUT_EXCHANGES = {"verse": 150, "jargon": 150, "word": 300, "function": 40, "class": 40}

ABOUT = (
    "I am a very small mixture-of-experts language model that ships with Fiddler as a demonstration. "
    "Ask me for a Bible verse, a word, a hacker term or a Python function."
)
GREETINGS = (
    *("Hello", "Hello!", "Hi", "Hi there", "Hey", "Good morning", "Help", "What can you do?"),
    *("Who are you?", "What are you?", "What is your name?", "Tell me about yourself."),
)
GREETING_REPEATS = 30

EXCHANGES_A_DOCUMENT = 6
SHORTEST_ANSWER = 30


def render(question: str, answer: str) -> str:
    """Return one exchange as the chat template writes it."""
    return f"{TURN_START}user\n{question}{TURN_END}\n{TURN_START}assistant\n{answer}{TURN_END}\n"


def documents(sources: Sequence[Document], rng: random.Random, counts: dict[str, int]) -> list[Document]:
    """Make chat documents, each a conversation of several exchanges, from the facts of ``sources``."""
    facts: dict[str, list[Fact]] = {kind: [] for kind in QUESTIONS}
    for source in sources:
        for fact in source.facts:
            if len(fact.answer) >= SHORTEST_ANSWER:
                facts[fact.kind].append(fact)
    exchanges = []
    for kind, count in counts.items():
        exchanges += [_exchange(fact, rng) for fact in _sample(facts[kind], count, rng)]
    if counts is TRAINING_EXCHANGES:
        exchanges += [render(greeting, ABOUT) for greeting in GREETINGS for _ in range(GREETING_REPEATS)]
    rng.shuffle(exchanges)
    starts = range(0, len(exchanges), EXCHANGES_A_DOCUMENT)
    texts = ["".join(exchanges[start : start + EXCHANGES_A_DOCUMENT]) for start in starts]
    return [Document("chat", f"chat {i}", "chat", text) for i, text in enumerate(texts)]


def _exchange(fact: Fact, rng: random.Random) -> str:
    return render(rng.choice(QUESTIONS[fact.kind]).format(fact.subject), fact.answer)


def _sample(facts: list[Fact], count: int, rng: random.Random) -> list[Fact]:
    """Draw ``count`` facts, using each equally often but for the last round."""
    drawn: list[Fact] = []
    while facts and len(drawn) < count:
        drawn += rng.sample(facts, min(len(facts), count - len(drawn)))
    return drawn
