"""Models of full size without a checkpoint: random weights made in memory, routing replayed from recordings."""
