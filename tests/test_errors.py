import re

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from cbam_pl.errors import UserError, as_user_error, is_out_of_memory


@pytest.mark.parametrize(
    "message",
    [
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4194304 bytes.",
        "CUDA out of memory. Tried to allocate 20.00 GiB.",
        "could not create a primitive",  # oneDNN's convolution
        "std::bad_alloc",
    ],
)
def test_every_library_s_word_for_too_little_memory_is_known(message):
    assert is_out_of_memory(RuntimeError(message))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("batch_size=0 must be at least 1"), "batch_size=0 must be at least 1"),
        (MisconfigurationException("no such strategy"), "no such strategy"),
        (MemoryError(), "out of memory; lower data.batch_size"),
        (RuntimeError("CUDA out of memory."), "out of memory; lower data.batch_size"),
    ],
)
def test_what_the_user_can_fix_becomes_one_error(error, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}"), as_user_error():
        raise error


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), as_user_error():
        raise RuntimeError("shapes cannot be multiplied")
