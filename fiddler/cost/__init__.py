"""What things take: seconds of expert compute, of copies and of the dense part, and lanes that share bandwidth."""
