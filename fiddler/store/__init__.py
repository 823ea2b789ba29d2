"""Where experts lie: tensor names to (layer, expert, part), and their bytes on the host."""
