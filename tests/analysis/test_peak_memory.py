"""Bytes that live at once, on functions whose peak is known."""

import torch

from vitweave.analysis.peak_memory import peak_bytes

KNOWN = torch.ones(1000)  # 4000 bytes


def test_what_is_dropped_makes_room():
    def chain():
        states = KNOWN
        for _ in range(10):
            states = states + 1  # the old one lives until the new one is there
        return states

    assert peak_bytes(chain, [KNOWN]) == 8000


def test_what_is_held_adds_up_and_views_are_free():
    def hold():
        held = [KNOWN + index for index in range(5)]
        return held, [one.view(10, 100) for one in held], KNOWN.view(100, 10)

    assert peak_bytes(hold, [KNOWN]) == 20000
    assert peak_bytes(lambda: KNOWN.view(10, 100), [KNOWN]) == 0
