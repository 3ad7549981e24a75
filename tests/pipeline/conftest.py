"""A server that stands for a webhook, for the tests of this folder."""

import threading
from collections.abc import Iterator

import pytest

from tests.pipeline.receiver import Receiver


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    server = Receiver()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
