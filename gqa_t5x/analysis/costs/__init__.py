"""What a model costs, by formula."""
