"""One notation for every array, and how each of its dimensions is sharded.

The letters name dimensions in variables, signatures and einsum strings of the
whole project (`q_BTNH`, `'BKGTH,BKHS->BKGTS'`):

| letter | meaning           | logical axis             | T5X's rule for it      |
|--------|-------------------|--------------------------|------------------------|
| B      | batch             | batch                    | data                   |
| T      | query length      | length                   | replicated             |
| S      | key/value length  | length                   | replicated             |
| D      | model width       | embed                    | replicated (or 2-D)    |
| F      | MLP width         | mlp                      | model                  |
| V      | vocabulary        | vocab                    | model                  |
| N      | query heads       | heads                    | model                  |
| K      | key/value heads   | kv_heads (heads if MHA)  | `kv_head_rules`        |
| G      | N / K             | -                        | -                      |
| H      | head size         | kv                       | replicated             |
| N*H    | query kernel      | joined_kv                | model                  |
| K*H    | key/value kernel  | joined_kv_heads          | `kv_head_rules`        |

Query head n reads key/value head n // G: groups are contiguous.

K/V heads have names of their own because T5X shards `heads` and `joined_kv` over
the model axis: with fewer K/V heads than model partitions that would cut inside a
head. Flax maps a name without a rule silently to "replicated", so every name here
must have a rule (tests/test_axes.py).
"""

BATCH, LENGTH, EMBED, MLP, VOCAB = 'batch', 'length', 'embed', 'mlp', 'vocab'
HEADS, HEAD_DIM, JOINED_HEADS = 'heads', 'kv', 'joined_kv'
KV_HEADS, JOINED_KV_HEADS = 'kv_heads', 'joined_kv_heads'
RELPOS_BUCKETS = 'relpos_buckets'


def kv_axes(num_heads: int, num_kv_heads: int) -> tuple[str, str]:
  """Returns the logical axes of the K/V heads and of the joined K/V kernel.

  With as many K/V heads as query heads these are T5X's own names, so that an MHA
  model is sharded exactly as T5X's.

  Args:
    num_heads: N.
    num_kv_heads: K.

  Returns:
    (axis of the K dimension, axis of the K*H dimension).
  """
  if num_kv_heads == num_heads:
    return HEADS, JOINED_HEADS
  return KV_HEADS, JOINED_KV_HEADS


def kv_head_rules(
  num_kv_heads: int | None, num_partitions: int
) -> tuple[tuple[str, str | None], ...]:
  """Returns the rules to add to T5X's `standard_logical_axis_rules`.

  K/V heads are split over the model axis when every partition gets whole heads,
  and replicated otherwise: never a cut inside a head.

  Args:
    num_kv_heads: K of the decoder (the greatest common divisor, if attention kinds
      differ); None for MHA, which has no axes of these names.
    num_partitions: number of model-parallel partitions.

  Returns:
    Logical axis rules, to be passed as `additional_rules`.

  Raises:
    ValueError: if a number is not positive.
  """
  if num_kv_heads is None:
    num_kv_heads = num_partitions
  if num_kv_heads < 1 or num_partitions < 1:
    raise ValueError(
      f'num_kv_heads={num_kv_heads} and num_partitions={num_partitions} must both'
      ' be at least 1.'
    )
  mesh_axis = 'model' if num_kv_heads % num_partitions == 0 else None
  return ((KV_HEADS, mesh_axis), (JOINED_KV_HEADS, mesh_axis))
