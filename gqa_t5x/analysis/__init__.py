"""What models cost: by formula, as TPU programs, and measured."""
