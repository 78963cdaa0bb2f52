"""Launching kernels: what is done where a GPU's shared memory is too small for the pipeline stages asked for."""

import pytest
from triton.runtime.errors import OutOfResources

from sparsify.kernels.launch import _first


class Kernel:
    """Stands for a kernel that takes so many bytes of shared memory a stage."""

    def __init__(self, stage: int, limit: int) -> None:
        self.stage, self.limit, self.asked = stage, limit, []

    def __call__(self, *arguments, **options):
        self.asked.append(options["num_stages"])
        required = self.stage * options["num_stages"]
        if required > self.limit:
            raise OutOfResources(required, self.limit, "shared memory")
        return arguments, options


def test_stages_are_as_many_as_fit():
    kernel = Kernel(40, 101)
    options = {"num_warps": 4, "num_stages": 4}
    assert _first(kernel, (1, 2), options) == ((1, 2), {"num_warps": 4, "num_stages": 2})
    assert kernel.asked == [4, 3, 2] and options["num_stages"] == 4


def test_all_stages_where_they_fit():
    kernel = Kernel(40, 1000)
    assert _first(kernel, (), {"num_stages": 4})[1]["num_stages"] == 4 and kernel.asked == [4]


def test_a_kernel_that_never_fits_is_an_error():
    with pytest.raises(OutOfResources, match="shared memory"):
        _first(Kernel(200, 101), (), {"num_stages": 3})


def test_other_resources_are_not_saved_by_fewer_stages():
    def run(**options):
        raise OutOfResources(2048, 1024, "threads")

    with pytest.raises(OutOfResources, match="threads"):
        _first(run, (), {"num_stages": 3})
