"""What gin hands to T5X. The only room that imports it."""
