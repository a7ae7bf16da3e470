"""The Python API: a T5 of any format, its tokenizer, and what is done with them."""
