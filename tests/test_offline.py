"""The guard of conftest.py holds: a test that reaches for the network fails, loopback stays open."""

import os
import socket

import pytest


def test_the_network_is_out_of_reach():
    with pytest.raises(RuntimeError, match="tests run without a network"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)  # an address reserved for documentation
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_loopback_is_open():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), timeout=5):
        pass
