"""Turns a multi-head-attention T5 checkpoint into a grouped-query one, or a latent one.

Read `methods` (how the heads of one attention module become fewer) and `shared_heads`
(the maths of svd), then `plan` (the whole model) and `units` (each of its modules),
then `run` (from disk to disk). `output_refit` brings outputs closer to the original's
after that. `gqa_t5x.convert` is the command.
"""
