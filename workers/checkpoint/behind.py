"""Writes tensors in a thread, so that what computes doesn't wait for the disk."""

from __future__ import annotations

from collections import deque
from threading import Condition, Thread
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# Bytes of tensors that may wait to be written; the next one waits until there are fewer.
WAITING_BYTES = 1 << 26


class TensorWriter(Protocol):
    """Destination of an artifact's tensors."""

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, from any device."""


class _Waiting(NamedTuple):
    name: str
    tensor: Tensor  # on the CPU
    arrived: torch.Event | None  # None: it is there


class WriteBehind:
    """Adds tensors to a writer in their order, in a thread of its own; the writer's errors are raised by later calls.

    On a card a tensor is copied to pinned memory, and the thread alone waits for it. Whoever uses the writer itself
    calls ``drain`` first.
    """

    def __init__(self, writer: TensorWriter) -> None:
        self._writer = writer
        self._queue: deque[_Waiting] = deque()
        self._bytes = 0
        self._changed = Condition()
        self._error: BaseException | None = None
        self._thread: Thread | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, from any device, once those before are written.

        Raises: what the writer raised for one of those before.
        """
        waiting = _on_host(name, tensor.detach())
        with self._changed:
            self._changed.wait_for(lambda: self._error or self._bytes < WAITING_BYTES)
            self._raise()
            self._queue.append(waiting)
            self._bytes += waiting.tensor.nbytes
            if self._thread is None:
                self._thread = Thread(target=self._write, name="write-behind", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def drain(self) -> None:
        """Wait until all tensors are written.

        Raises: what the writer raised for one of them.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._error or self._thread is None)
            self._raise()

    def stop(self) -> None:
        """Leave what isn't written, and wait for what is being written; errors are forgotten."""
        with self._changed:
            self._queue.clear()
            self._changed.wait_for(lambda: self._thread is None)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _write(self) -> None:
        """Write what waits, until there is nothing or an error."""
        while True:
            with self._changed:
                if not self._queue or self._error is not None:
                    self._queue.clear()
                    self._bytes, self._thread = 0, None
                    self._changed.notify_all()
                    return
                name, tensor, arrived = self._queue.popleft()
            try:
                if arrived is not None:
                    arrived.synchronize()
                self._writer.add(name, tensor)
            except BaseException as error:
                self._error = error
            with self._changed:
                self._bytes -= tensor.nbytes
                self._changed.notify_all()


def _on_host(name: str, tensor: Tensor) -> _Waiting:
    if tensor.device.type == "cpu":
        # Here, for torch's kernels in another thread have a pool of threads of their own, which spin beside this one's.
        return _Waiting(name, tensor.contiguous(), None)
    there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    return _Waiting(name, there, torch.accelerator.current_stream(tensor.device).record_event())
