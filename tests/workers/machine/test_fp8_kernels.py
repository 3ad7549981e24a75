"""When transformers computes fp8 with its kernels: as transformers itself says."""

import pytest
from packaging.version import Version
from transformers.utils import import_utils

from workers.machine import fp8_kernels


def test_the_versions_are_those_of_transformers() -> None:
    assert Version(import_utils.KERNELS_MIN_VERSION) == fp8_kernels.LEAST
    assert Version(import_utils.KERNELS_MAX_VERSION) == fp8_kernels.BELOW
    assert import_utils.is_kernels_available() == (fp8_kernels.lacking((9, 0)) == "")


@pytest.mark.parametrize(
    ("capability", "installed", "says"),
    [
        ((8, 9), "0.18.2", ""),
        ((12, 0), "0.18.9", ""),
        ((9, 0), "0.17.0", "got 0.17.0; pip install 'kernels>=0.18.2,<0.19.0'"),
        ((9, 0), "0.19.0", "got 0.19.0"),
        ((9, 0), None, "package kernels is not installed"),
        ((8, 6), "0.18.2", "compute capability 8.6, expected 8.9 or more"),
        (None, "0.18.2", "there is no GPU"),
    ],
)
def test_what_the_kernels_lack(capability: tuple[int, int] | None, installed: str | None, says: str) -> None:
    found = fp8_kernels._lacking(capability, installed)
    assert says in found
    assert bool(found) is bool(says)
