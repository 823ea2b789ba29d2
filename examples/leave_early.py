"""Leaving a stream ends its request. Here under trio, with a time limit around the whole answer."""

import trio

from fiddler import DEMO, Engine


async def main() -> None:
    async with Engine(DEMO) as engine:
        with trio.move_on_after(0.5):
            async with engine.generate_stream([{"role": "user", "content": "What is a kluge?"}], seed=1) as stream:
                async for token in stream:
                    print(token.text, end="", flush=True)
        print("\nleft; the next request runs alone")
        print((await engine.generate("And it came to pass", max_new_tokens=16)).text)


trio.run(main)
