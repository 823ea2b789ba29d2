"""The pictures of README and docs, all made by one command: `python -m bench.figures`."""
