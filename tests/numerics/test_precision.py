"""The precision of products is a setting of the process, which threads at the same time don't change."""

from threading import Thread

import torch
from greenlet import greenlet

from workers.numerics.precision import coarse_products, compute_exactly


def precision() -> str:
    with coarse_products():
        return torch.get_float32_matmul_precision()


def test_a_thread_beside_others_leaves_the_setting_as_it_is() -> None:
    """So do its greenlets, in which layers run."""
    seen: list[str] = []

    def beside() -> None:
        compute_exactly()
        seen.append(precision())
        greenlet(lambda: seen.append(precision())).switch()

    before = torch.get_float32_matmul_precision()
    thread = Thread(target=beside)
    thread.start()
    thread.join()
    assert seen == [before, before] == ["highest", "highest"]
    assert precision() == "medium"
    assert torch.get_float32_matmul_precision() == before
