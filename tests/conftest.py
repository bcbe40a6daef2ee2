"""Before any test module imports Triton: interpret its kernels, unless told to use the GPU."""

import os

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def corpus():
    """Documents of the nursery, about 60 kB."""
    from nursery import nursery

    return nursery(60_000, "test")[0]
