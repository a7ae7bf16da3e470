"""The T5 encoder-decoder with any number of key/value heads. Knows arrays alone."""
