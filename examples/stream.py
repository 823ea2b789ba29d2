"""Stream one completion. `python examples/stream.py [CHECKPOINT]`; without one, the built-in demo model."""

import asyncio
import sys

from fiddler import DEMO, Engine


async def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else DEMO
    async with Engine(model) as engine:
        async for token in engine.generate_stream("And it came to pass", max_new_tokens=40):
            print(token.text, end="", flush=True)
        print()


asyncio.run(main())
