"""Documents whose numbers come from result files, and are held to them."""
