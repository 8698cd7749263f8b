"""Threads that use MKL, and processes that are forked after them."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from corymb.strategies.core.threads import pool

FORKS = 60


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_processes_forked_after_threads_used_mkl_end() -> None:
    """With a pool that ends its threads before each fork, one process in seven waited for ever."""
    left, right = torch.randn(2000, 784), torch.randn(784, 64)

    def product(_: int) -> float:
        return float((left @ right).sum())

    for number in range(FORKS):
        list(pool(2).map(product, range(4)))
        process = os.fork()
        if not process:
            torch.set_num_threads(1)
            product(0)
            os._exit(0)
        deadline = time.monotonic() + 20
        while not os.waitpid(process, os.WNOHANG)[0]:
            if time.monotonic() > deadline:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                pytest.fail(f"process {number} did not end")
            time.sleep(0.001)


def test_a_forked_process_makes_threads_of_its_own() -> None:
    assert pool(2) is pool(2)
    read, write = os.pipe()
    process = os.fork()
    if not process:
        os.write(write, str(list(pool(2).map(abs, [-1, 2]))).encode())
        os._exit(0)
    os.waitpid(process, 0)
    assert os.read(read, 20) == b"[1, 2]"
