"""Turns a multi-head-attention T5.1.1 checkpoint into a grouped-query one.

Read `methods` (the maths of one attention module), then `params` (the whole model),
then `checkpoint` and `writer` (the formats on disk). `gqa_t5x.convert` is the command.
"""
