"""Turns a multi-head-attention T5 checkpoint into a grouped-query one.

Read `methods` (how the heads of one attention module become fewer) and `shared_heads`
(the maths of svd), then `plan` (the whole model), then `run` (from disk to disk).
`gqa_t5x.convert` is the command.
"""
