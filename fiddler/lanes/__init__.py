"""What runs a plan: expert compute and the combination of its results."""
