"""What the model costs, by formula: to be set beside what is measured."""
