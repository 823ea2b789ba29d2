"""Several requests at once share every forward: start them, then gather."""

import asyncio

from fiddler import DEMO, Engine

PROMPTS = ["And it came to pass", "def main(", "A hacker is", "To install a package"]


async def main() -> None:
    async with Engine(DEMO) as engine:
        results = await asyncio.gather(*(engine.generate(p, max_new_tokens=24, do_sample=False) for p in PROMPTS))
        for prompt, result in zip(PROMPTS, results, strict=True):
            print(f"{prompt}{result.text!r} ({result.usage.completion_tokens} tokens, {result.finish_reason})")
        done = engine.statistics()
        print(f"{done.n_new_tokens} tokens in {done.n_steps} steps")


asyncio.run(main())
