"""The experiments of the papers as stages: models, scales, targets."""
