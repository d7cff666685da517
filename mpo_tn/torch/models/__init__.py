"""What is done to a model: its matrices found, compressed, cut, and chosen to train."""
