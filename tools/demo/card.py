"""The model card, from the numbers of the report."""

from __future__ import annotations

from typing import Any

from tools.demo import corpus

CONTENTS = {
    "scripture": "the King James Bible",
    "jargon": "the lexicon of the Jargon File",
    "dictionary": "WordNet glosses with example sentences",
    "python": "sources of the Python standard library",
    "manual": "the SQLite manual",
}

CARD = """\
# Fiddler demo checkpoint

A Qwen3-MoE language model small enough to ship: {millions:.2f} million parameters, of which {active:.2f} million
work on a token; 6 layers of 16 experts, 2 a token; hidden size 128; a byte-level vocabulary of 4096 entries;
tied embeddings; stored in bfloat16. It was trained from scratch for {minutes:.0f} minutes on two busy CPU cores
({tokens:.1f} million tokens), in windows of 256 and at the end 1024 tokens. Positions go up to 2048; past 1024
it is untrained. It exists to show the tool at work: it writes in the manner of its text, and what it states is
often wrong.

Chat with it about a Bible verse ("Read me Genesis 1:3"), a word ("What does brisk mean?"), a hacker term ("What
is a kluge?") or a Python function ("What does shutil.copytree do?"); or let it continue text of these kinds.

## Text and licences

| domain | text | licence | Debian packages |
|---|---|---|---|
{text_rows}

Chat turns are made from verses, entries and docstrings of this text. Nothing else was read.
The notice that the WordNet licence asks for:
WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved. {disclaimer}

## Held-out text

Bits per byte of text that was not trained on (whole books, runs of neighbouring entries, modules and pages),
against `xz -9` on the same bytes. "Seen" is the share of its eight-word runs that occur anywhere in the training
text.

| domain | held out | model | xz -9 | seen |
|---|---|---|---|---|
{score_rows}

## Experts

Which experts work depends on the domain: the mean total-variation distance between two domains' shares is
**{locality:.3f}** (0: the same, 1: disjoint). The least used expert of any layer has {least:.1%} of its layer's
choices (an even share is {even:.1%}). How often an expert of a token is also one of the previous token's (by
chance {chance:.1%}): {reuse}.

The largest shares in each layer (expert number: share):

| domain | {layers} |
|---|{rule}
{usage_rows}

`report.json` has all numbers. Made by `python -m tools.demo`, in the sources of Fiddler. The learning rate follows
the clock and a run may be interrupted and continued, so another run gives a model like this one, not the same.
"""
# The end of the notice is part of what the licence wants kept.
DISCLAIMER = (
    'THIS SOFTWARE AND DATABASE IS PROVIDED "AS IS" AND PRINCETON UNIVERSITY MAKES NO REPRESENTATIONS OR '
    "WARRANTIES, EXPRESS OR IMPLIED. BY WAY OF EXAMPLE, BUT NOT LIMITATION, PRINCETON UNIVERSITY MAKES NO "
    "REPRESENTATIONS OR WARRANTIES OF MERCHANT- ABILITY OR FITNESS FOR ANY PARTICULAR PURPOSE OR THAT THE USE OF "
    "THE LICENSED SOFTWARE, DATABASE OR DOCUMENTATION WILL NOT INFRINGE ANY THIRD PARTY PATENTS, COPYRIGHTS, "
    "TRADEMARKS OR OTHER RIGHTS."
)


def render(report: dict[str, Any]) -> str:
    """Return the model card for a report."""
    experts = report["experts"]
    shares = experts["share_by_domain_and_layer"]
    layers = range(len(next(iter(shares.values()))))
    reuse = experts["reused_from_previous_token"]
    return CARD.format(
        millions=report["parameters"] / 1e6,
        active=report["parameters_a_token"] / 1e6,
        minutes=report["training"]["minutes"],
        tokens=report["training"]["tokens"] / 1e6,
        text_rows=_text_rows(report),
        score_rows=_score_rows(report["held_out"]),
        disclaimer=DISCLAIMER,
        locality=experts["locality"],
        least=experts["least_share_of_an_expert"],
        even=experts["even_share"],
        chance=experts["reused_by_chance"],
        reuse=", ".join(f"{domain} {share:.1%}" for domain, share in reuse.items()),
        layers=" | ".join(f"layer {layer}" for layer in layers),
        rule="---|" * len(layers),
        usage_rows="\n".join(f"| {domain} | {' | '.join(map(_top, table))} |" for domain, table in shares.items()),
    )


def _text_rows(report: dict[str, Any]) -> str:
    rows = []
    for domain, source in corpus.SOURCES.items():
        names = ", ".join(f"{package} {report['packages'][package]}" for package in source.PACKAGES)
        size = report["held_out"][domain]["training_bytes"] / 1e6
        rows.append(f"| {domain} | {CONTENTS[domain]}, {size:.1f} MB | {source.LICENCE} | {names} |")
    return "\n".join(rows)


def _score_rows(held_out: dict[str, dict[str, Any]]) -> str:
    rows = []
    for domain, numbers in held_out.items():
        seen = numbers.get("eight_word_runs_seen_in_training")
        rows.append(
            f"| {domain} | {numbers['held_out_bytes'] / 1000:.0f} kB | {numbers['bits_per_byte']:.3f} "
            f"| {numbers['xz_bits_per_byte']:.3f} | {'' if seen is None else f'{seen:.1%}'} |"
        )
    return "\n".join(rows)


def _top(shares: list[float]) -> str:
    best = sorted(range(len(shares)), key=lambda expert: -shares[expert])[:3]
    return ", ".join(f"{expert}: {shares[expert]:.0%}" for expert in best)
