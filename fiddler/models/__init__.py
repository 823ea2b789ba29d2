"""Everything that knows transformers: the two seams, loading, tokenising and sampling."""
