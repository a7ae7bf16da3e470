"""For all tests: eight CPU devices, no network, and the slow ones last."""

import os
import socket

# Before anything imports JAX or TensorFlow; commands in subprocesses inherit it.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'
os.environ['NO_GCE_CHECK'] = 'true'  # Or TensorFlow looks for Google Cloud's metadata.
os.environ['GCE_METADATA_HOST'] = 'localhost:1'

import jax
import pytest

# For sharding: an array lies on the first unless a mesh says otherwise. Commands in
# subprocesses have one.
jax.config.update('jax_num_cpu_devices', 8)

_connect = socket.socket.connect


def pytest_collection_modifyitems(items):
  """Moves the slow tests behind the others; both keep their order."""
  items.sort(key=lambda item: item.get_closest_marker('slow') is not None)


@pytest.fixture(scope='module')
def quick_compilation():
  """For tests that compile much and compute little."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
  """Fails what connects to another machine, instead of waiting for it."""

  def connect(self, address):
    local = isinstance(address, str) or address[0] in ('127.0.0.1', '::1', 'localhost')
    if not local:
      raise OSError(f'a test connects to {address}')
    return _connect(self, address)

  monkeypatch.setattr(socket.socket, 'connect', connect)
