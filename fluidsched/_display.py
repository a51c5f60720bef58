"""Objects that hold a table show it: in Jupyter, and as LaTeX for a paper."""

from __future__ import annotations

import math
import numbers
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from fluidsched._checks import check_count
from fluidsched.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Tabular", "latex_table"]

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}
_SPECIAL = re.compile("|".join(map(re.escape, _LATEX)))


class Tabular(ABC):
    """An object whose content is a table."""

    @abstractmethod
    def to_frame(self) -> pd.DataFrame:
        """The table, with units in its column names or its documentation."""

    def _shown_frame(self) -> pd.DataFrame:
        """The table as people are shown it."""
        return self.to_frame()

    def _summary(self) -> Sequence[tuple[str, str]]:
        """(name, value) of what stands above the table; nothing: the first line of the text."""
        return ()

    def _repr_html_(self) -> str:
        summary = self._summary()
        cell = "style='text-align:left'"
        rows = "".join(
            f"<tr><th {cell}>{escape(name)}</th><td {cell}>{escape(value)}</td></tr>"
            for name, value in summary
        )
        head = f"<table>{rows}</table>" if summary else f"<p>{escape(repr(self).splitlines()[0])}</p>"
        frame = self._shown_frame()
        return head + str(frame.to_html(index=not _is_counted(frame), max_rows=20))

    def to_latex(
        self,
        *,
        columns: Sequence[str] | None = None,
        digits: int = 4,
        caption: str | None = None,
        label: str | None = None,
    ) -> str:
        r"""The table as it is shown, for LaTeX with the package ``booktabs``.

        Parameters
        ----------
        columns : sequence of str, optional
            Which columns, in this order; all by default.
        digits : int
            Significant digits of numbers that are not whole.
        caption, label : str, optional
            With either, the ``tabular`` stands in a ``table``. The caption is LaTeX, taken as it is.

        Returns
        -------
        str

        Raises
        ------
        InputError
            If the table has no such column.
        """
        return latex_table(self._shown_frame(), columns=columns, digits=digits, caption=caption, label=label)


def latex_table(
    frame: pd.DataFrame,
    *,
    columns: Sequence[str] | None = None,
    digits: int = 4,
    caption: str | None = None,
    label: str | None = None,
) -> str:
    r"""A frame as a LaTeX ``tabular``; text is escaped, numbers are aligned to the right.

    Parameters are those of `Tabular.to_latex`.

    Examples
    --------
    >>> import pandas as pd
    >>> print(latex_table(pd.DataFrame({"type": ["a_1"], "rate": [0.123456]})))
    \begin{tabular}{lr}
    \toprule
    type & rate \\
    \midrule
    a\_1 & 0.1235 \\
    \bottomrule
    \end{tabular}
    """
    import pandas as pd

    digits = check_count("digits", digits, minimum=1)
    if not _is_counted(frame):
        frame = frame.reset_index()
    names = [
        " ".join(str(part) for part in name if part) if isinstance(name, tuple) else str(name)
        for name in frame
    ]
    frame = frame.set_axis(names, axis="columns")
    if columns is not None:
        missing = [name for name in columns if name not in names]
        if missing:
            raise InputError("columns", missing[0], f"be among {', '.join(names)}")
        frame = frame[list(columns)]
    sides = "".join("r" if pd.api.types.is_numeric_dtype(frame[name]) else "l" for name in frame)
    rows = [[_latex(value, digits) for value in row] for row in frame.itertuples(index=False, name=None)]
    head = [_latex(str(name), digits) for name in frame]
    lines = [
        rf"\begin{{tabular}}{{{sides}}}",
        r"\toprule",
        " & ".join(head) + r" \\",
        r"\midrule",
        *(" & ".join(row) + r" \\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    if caption is not None or label is not None:
        lines = [
            r"\begin{table}",
            r"\centering",
            *([rf"\caption{{{caption}}}"] if caption is not None else []),
            *([rf"\label{{{label}}}"] if label is not None else []),
            *lines,
            r"\end{table}",
        ]
    return "\n".join(lines)


def _is_counted(frame: pd.DataFrame) -> bool:
    """Whether the index only counts the rows."""
    import pandas as pd

    return isinstance(frame.index, pd.RangeIndex) and frame.index.name is None


def _latex(value: object, digits: int) -> str:
    if value is None:
        return "--"
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, numbers.Integral):
        return f"{int(value):,}".replace("-", "$-$")
    if isinstance(value, numbers.Real):
        number = float(value)
        if math.isnan(number):
            return "--"
        if math.isinf(number):
            return r"$\infty$" if number > 0 else r"$-\infty$"
        text = f"{number:,.0f}" if number.is_integer() and abs(number) < 1e15 else f"{number:.{digits}g}"
        mantissa, _, power = text.partition("e")
        return rf"${mantissa} \cdot 10^{{{int(power)}}}$" if power else text.replace("-", "$-$")
    return _SPECIAL.sub(lambda found: _LATEX[found.group()], str(value))
