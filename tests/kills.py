"""Work in a process of its own that is killed at a chosen call, for several test files."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch


def killed_at(call: int, owner: Any, place: str, work: Callable[[], Any]) -> None:
    """Runs `work` in a copy of this process, killed at the `call`th call of `owner`'s `place`.

    Nothing is imported anew, so a process that is to be killed costs no more than its work.
    """
    pid = os.fork()
    if pid == 0:
        try:
            # A fork makes torch build its thread pool anew at the next use, and two threads that
            # do so together (transformers loads with several) fail with "Invalid thread pool".
            torch.set_num_threads(1)
            _kill_at(call, owner, place)
            work()
        except BaseException:  # the copy must never come back into pytest
            traceback.print_exc(file=sys.__stderr__)
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def _kill_at(call: int, owner: Any, place: str) -> None:
    original, calls = getattr(owner, place), 0

    def counting(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(owner, place, counting)
