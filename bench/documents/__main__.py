"""Rewrite the numbers in documents from the files they come from, or check them: `python -m bench.documents`."""

from bench.documents.checker import main

main()
