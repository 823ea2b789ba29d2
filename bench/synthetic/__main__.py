"""Open a model made in memory and generate with it: `python -m bench.synthetic`."""

from bench.synthetic.command import main

main()
