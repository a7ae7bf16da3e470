"""The likeliest tokens, where each device has a part of the rows and the vocabulary.

XLA cuts no `lax.top_k`: it would gather float32 `[rows, V]` on every device.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from gqa_t5x.model import axes, sharding


def top_k(x_BnV: Array, k: int) -> tuple[Array, Array]:
  """Returns what `lax.top_k` does of `x_BnV` as `[B, n * V]`, in the same order.

  In a mesh each device finds the k best of its tokens, and those alone travel. Rows or
  tokens that the devices do not divide are gathered.

  Returns:
    (the k largest values `[B, k]`; their places `[B, k]`, int32 below n * V). Of equal
    values the one with the lower place comes first.
  """
  B, n, V = x_BnV.shape
  spec = sharding.spec([_if_divided(axes.BATCH, B), None, _if_divided(axes.VOCAB, V)])
  rows, _, tokens = spec
  if rows is tokens is None:
    return lax.top_k(x_BnV.reshape(B, n * V), k)

  def on_one_device(x_BnV):
    best_Bnk, token_Bnk = lax.top_k(x_BnV, min(k, x_BnV.shape[2]))
    first = 0 if tokens is None else lax.axis_index(tokens) * x_BnV.shape[2]
    found = best_Bnk, token_Bnk + first + V * jnp.arange(n)[:, None]
    if tokens is not None:
      # In the order of places, so that of equal ones the first still comes first.
      found = (lax.all_gather(y, tokens, axis=2, tiled=True) for y in found)
    best_Bm, place_Bm = (y.reshape(len(y), -1) for y in found)
    best_Bk, chosen_Bk = lax.top_k(best_Bm, k)
    return best_Bk, jnp.take_along_axis(place_Bm, chosen_Bk, axis=1)

  run = jax.shard_map(
    on_one_device,
    mesh=sharding.current_mesh(),
    in_specs=spec,
    out_specs=jax.P(rows),
    check_vma=False,  # It cannot tell that what is gathered is the same on all.
  )
  return run(x_BnV)


def _if_divided(name: str, size: int) -> str | None:
  """Returns a logical axis, if the mesh cuts it into more parts than one, all equal."""
  parts = sharding.parts(name)
  return name if parts > 1 and size % parts == 0 else None
