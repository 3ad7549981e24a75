"""Tensors written in a thread: their order, their errors, and what is left when one stops."""

from __future__ import annotations

import errno
from threading import Event, Thread, Timer, current_thread, main_thread

import pytest
import torch
from torch import Tensor

from workers.checkpoint import behind
from workers.checkpoint.behind import WriteBehind

SECONDS = 10.0


class Disk:
    """A destination that writes once it is let, and is full after some tensors."""

    def __init__(self, most: int = 1000) -> None:
        self.let, self.begun = Event(), Event()
        self.most = most
        self.written: list[tuple[str, Tensor]] = []
        self.by_this_thread = False

    def add(self, name: str, tensor: Tensor) -> None:
        self.begun.set()
        assert self.let.wait(SECONDS)
        self.by_this_thread |= current_thread() is main_thread()
        if len(self.written) == self.most:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.written.append((name, tensor))


def test_tensors_are_written_in_their_order_while_this_thread_goes_on() -> None:
    disk = Disk()
    writer = WriteBehind(disk)
    given = [(str(number), torch.full((3,), number)) for number in range(50)]
    for name, tensor in given:
        writer.add(name, tensor)  # nothing may be written yet
    assert not disk.written
    disk.let.set()
    writer.drain()
    assert [name for name, _ in disk.written] == [name for name, _ in given]
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(disk.written, given, strict=True))
    assert not disk.by_this_thread
    writer.add("later", torch.ones(1))
    writer.drain()
    assert disk.written[-1][0] == "later"


def test_a_full_disk_is_the_error_of_the_next_call_and_of_every_other() -> None:
    disk = Disk(most=1)
    writer = WriteBehind(disk)
    for name in ("one", "two", "three"):
        writer.add(name, torch.ones(1))
    disk.let.set()
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            writer.drain()
    with pytest.raises(OSError, match="No space left"):
        writer.add("four", torch.ones(1))
    writer.stop()
    assert [name for name, _ in disk.written] == ["one"], "what comes after isn't written"


def test_stopping_leaves_what_waits_and_ends_what_is_being_written() -> None:
    disk = Disk()
    writer = WriteBehind(disk)
    writer.add("one", torch.ones(1))
    writer.add("two", torch.ones(1))
    assert disk.begun.wait(SECONDS)
    Timer(0.2, disk.let.set).start()
    writer.stop()
    assert [name for name, _ in disk.written] == ["one"]


def test_it_waits_while_much_is_to_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(behind, "WAITING_BYTES", 100)
    disk = Disk()
    writer = WriteBehind(disk)
    writer.add("large", torch.ones(1000))  # alone it may be larger
    adding = Thread(target=writer.add, args=("next", torch.ones(1)))
    adding.start()
    adding.join(0.2)
    assert adding.is_alive()
    disk.let.set()
    adding.join(SECONDS)
    writer.drain()
    assert [name for name, _ in disk.written] == ["large", "next"]
