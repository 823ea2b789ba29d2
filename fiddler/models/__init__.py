"""Everything that knows transformers: seams for experts, attention and masks, loading, sampling."""
