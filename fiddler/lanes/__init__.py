"""Runs jobs: experts on rows, copies, and the sums of results."""
