"""Makes the demo checkpoint that ships in ``fiddler/demo``; run it with ``python -m tools.demo``."""
