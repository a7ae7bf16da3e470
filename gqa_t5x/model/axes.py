"""One notation for every array, and how each of its dimensions is sharded.

The letters name dimensions in variables, signatures and einsum strings of the
whole project (`q_BTNR`, `'BKGTR,BKRS->BKGTS'`):

| letter | meaning           | logical axis             | T5X's rule for it      |
|--------|-------------------|--------------------------|------------------------|
| B      | batch             | batch                    | data                   |
| B      | of kept K and V   | cache_batch              | `kv_head_rules`        |
| T      | query length      | length                   | replicated             |
| S      | key/value length  | length                   | replicated             |
| D      | model width       | embed                    | replicated (or 2-D)    |
| F      | MLP width         | mlp                      | model                  |
| V      | vocabulary        | vocab                    | model                  |
| N      | query heads       | heads                    | model                  |
| N      | at kept K and V   | cache_heads (heads: MHA) | `kv_head_rules`        |
| K      | key/value heads   | kv_heads (heads if MHA)  | `kv_head_rules`        |
| G      | N / K             | -                        | -                      |
| H      | head size         | kv                       | replicated             |
| R      | K/V head size     | kv                       | replicated             |
| N*H    | query kernel      | joined_kv                | model                  |
| K*R    | key/value kernel  | joined_kv_heads          | `kv_head_rules`        |

Query head n reads K/V head n // G: groups are contiguous. R is H but in the latent form
(attention.py), whose kernels between R and N*H are split as the query's.

K/V heads have names of their own because T5X shards `heads` and `joined_kv` over
the model axis: with fewer K/V heads than model partitions that would cut inside a
head. What decoding keeps (the collections `cache` and `encoded_kv`), and the queries
that meet it, have others, because its rows may be split further than all other rows.
Flax maps a name without a rule silently to "replicated": every name here has one
(tests/model/test_axes.py).
"""

BATCH, LENGTH, EMBED, MLP, VOCAB = 'batch', 'length', 'embed', 'mlp', 'vocab'
HEADS, HEAD_DIM, JOINED_HEADS = 'heads', 'kv', 'joined_kv'
KV_HEADS, JOINED_KV_HEADS = 'kv_heads', 'joined_kv_heads'
CACHE_BATCH, CACHE_HEADS = 'cache_batch', 'cache_heads'
RELPOS_BUCKETS = 'relpos_buckets'

# What splits keys and values over the model axis -> mesh axes of KV_HEADS, CACHE_HEADS
# and CACHE_BATCH.
KV_SHARDINGS = {
  'heads': ('model', 'model', ('data',)),
  'batch': (None, None, (('data', 'model'), 'data')),
  'replicated': (None, 'model', ('data',)),
}


def check_heads(num_heads: int, num_kv_heads: int) -> None:
  """Raises ValueError if K does not divide N; names the numbers that would do."""
  if num_heads < 1:
    raise ValueError(f'num_heads={num_heads} must be at least 1.')
  if not 1 <= num_kv_heads <= num_heads or num_heads % num_kv_heads:
    divisors = [k for k in range(1, num_heads + 1) if num_heads % k == 0]
    raise ValueError(
      f'num_heads={num_heads} is not divisible by num_kv_heads={num_kv_heads};'
      f' choose one of {", ".join(map(str, divisors))}.'
    )


def check_kv_head_dim(num_heads: int, head_dim: int, kv_head_dim: int) -> None:
  """Raises ValueError unless 1 <= R <= N*H: all heads have no more to share."""
  most = num_heads * head_dim
  if not 1 <= kv_head_dim <= most:
    raise ValueError(
      f'kv_head_dim={kv_head_dim} must be from 1 to num_heads * head_dim ='
      f' {num_heads} * {head_dim} = {most}.'
    )


def kv_axes(num_heads: int, num_kv_heads: int) -> tuple[str, str, str]:
  """Returns the axes of K, of K*R, and of N where queries meet kept keys and values.

  With as many K/V heads as query heads these are T5X's own names, so that an MHA
  model is sharded exactly as T5X's.
  """
  if num_kv_heads == num_heads:
    return HEADS, JOINED_HEADS, HEADS
  return KV_HEADS, JOINED_KV_HEADS, CACHE_HEADS


def kv_head_rules(
  num_kv_heads: int | None, num_partitions: int, kv_sharding: str | None = None
) -> tuple[tuple[str, str | tuple[str, str] | None], ...]:
  """Returns the `additional_rules` of T5X's `standard_logical_axis_rules`.

  Never a cut inside a head. Keys and values are split over the model axis by

    'heads': every partition has whole heads.
    'batch': every partition has all heads, of its share of the rows that decoding
      keeps. Queries and outputs change places for that, keys and values do not. In
      training the K and V kernels and activations are replicated.
    'replicated': nothing; every partition reads all that decoding keeps.

  Args:
    num_kv_heads: K of the decoder (the greatest common divisor, if attention kinds
      differ); None for MHA, whose heads are split by T5X's own rules.
    num_partitions: model-parallel ones.
    kv_sharding: None is by rule: 'heads' where K divides evenly, otherwise 'batch',
      which reads least.

  Raises:
    ValueError: if a number is not positive, or `kv_sharding` is unknown, cuts inside a
      head, or is not for MHA.

  Source: Pope et al. 2022 (arXiv 2211.05102), section 3.3, for 'batch'.
  """
  _check_kv_sharding(num_kv_heads, num_partitions, kv_sharding)
  even = num_kv_heads is None or num_kv_heads % num_partitions == 0
  by_rule = 'heads' if even else 'batch'
  heads, cache_heads, rows = KV_SHARDINGS[kv_sharding or by_rule]
  return (
    (KV_HEADS, heads),
    (JOINED_KV_HEADS, heads),
    # The first that is free counts: heads of an MHA layer take the model axis first.
    *((CACHE_BATCH, mesh_axes) for mesh_axes in rows),
    (CACHE_HEADS, cache_heads),
  )


def _check_kv_sharding(K: int | None, num_partitions: int, kv_sharding: str | None):
  if num_partitions < 1 or (K is not None and K < 1):
    raise ValueError(
      f'num_kv_heads={K} and num_partitions={num_partitions} must both be at least 1.'
    )
  if kv_sharding not in (None, *KV_SHARDINGS):
    known = ', '.join(KV_SHARDINGS)
    raise ValueError(f'kv_sharding={kv_sharding!r} is unknown; choose one of {known}.')
  if K is None and kv_sharding not in (None, 'heads'):
    raise ValueError(
      f'kv_sharding={kv_sharding!r} is for fewer key/value heads than query heads,'
      ' and num_kv_heads is None: give num_kv_heads, or no kv_sharding.'
    )
  if K is not None and K % num_partitions and kv_sharding == 'heads':
    divisors = ', '.join(str(n) for n in range(1, K + 1) if K % n == 0)
    raise ValueError(
      f"kv_sharding='heads' would cut inside a head: num_kv_heads={K} is not divisible"
      f' by num_partitions={num_partitions}; choose one of {divisors} partitions, or'
      " kv_sharding='batch' or 'replicated'."
    )
