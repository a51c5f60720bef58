"""What drawing leaves behind in Matplotlib."""

from __future__ import annotations

import matplotlib as mpl
import pytest

from fluidsched import plots


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_style_returns_the_settings_but_keeps_what_a_backend_switched(before: bool, after: bool) -> None:
    """A notebook's backend makes Matplotlib interactive when the first figure loads it; later ones show by that."""
    size, was = mpl.rcParams["font.size"], mpl.is_interactive()
    try:
        mpl.interactive(before)
        with plots.style():
            assert mpl.rcParams["font.size"] == 8.0
            mpl.interactive(after)
        assert mpl.is_interactive() is after
        assert mpl.rcParams["font.size"] == size
    finally:
        mpl.interactive(was)
