"""Networks as programs: which are refused."""

import pytest

from src.interop.programs import Bare
from tests.model.networks import SMALL, small


@pytest.mark.parametrize("name", SMALL)
def test_a_second_time_is_refused(name):
    with pytest.raises(ValueError, match=r"model\.second_time=true"):
        Bare(small(name, second_time=True))
