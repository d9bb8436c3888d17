"""Iterators that run ahead of their consumer."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def prefetch(items: Iterable[Item], depth: int = 2) -> Generator[Item]:
    """Yield the items in order, made on a thread, at most ``depth`` ahead of the last one yielded.

    A yielded item is not kept here. An error is raised in the place of its item. Closing the
    generator stops the thread after the item that it is making.

    >>> list(prefetch(range(4)))
    [0, 1, 2, 3]
    """
    ready: queue.SimpleQueue[list[Item] | BaseException | None] = queue.SimpleQueue()
    room, closed = threading.Semaphore(depth), threading.Event()

    def produce() -> None:
        room.acquire()
        try:
            for item in items:
                ready.put([item])
                del item  # the consumer alone holds it
                room.acquire()
                if closed.is_set():
                    return
            ready.put(None)
        except BaseException as error:  # noqa: BLE001
            ready.put(error)  # the consumer raises it

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            made = ready.get()
            if made is None:
                return
            if isinstance(made, BaseException):
                raise made
            room.release()
            yield made.pop()
    finally:
        closed.set()
        room.release()
        thread.join()


def look_ahead(items: Iterable[Item], depth: int) -> Iterator[Item]:
    """Yield the items in order, each once ``depth`` further items were taken from the source.

    Meant for items such as futures, whose work begins when they are made. An error is raised in the
    place of its item.

    >>> made = []
    >>> next(look_ahead((made.append(number) or number for number in range(9)), 2)), made
    (0, [0, 1, 2])
    """
    waiting: deque[Item] = deque()
    failure: Exception | None = None
    try:
        for item in items:
            waiting.append(item)
            if len(waiting) > depth:
                yield waiting.popleft()
    except Exception as error:  # noqa: BLE001
        failure = error  # raised after the items before it
    yield from waiting
    if failure is not None:
        raise failure
