"""A bound as a value: a number with its direction and conditions, or the reason why there is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fluidsched._checks import check_choice, check_real

__all__ = ["Bound"]


@dataclass(frozen=True, repr=False)
class Bound:
    """One bound on one quantity.

    A theorem has conditions. Outside them the bound is *not applicable*: `value` is None and `condition` names
    what is violated; no number is ever given that the theorem does not stand behind.

    Parameters
    ----------
    name : str
        The quantity bounded, as in "mean_ttft[chat]".
    value : float or None
        In `unit`; None when not applicable. Infinite is a value ("no finite bound follows").
    unit : str
        "s", "requests", "requests/s", "tokens", …; "" for a pure number.
    direction : {"upper", "lower"}
        Whether the quantity is at most, or at least, the value.
    formula : str
        The formula the number comes from.
    source : str
        Where it is proved.
    condition : str
        Under which conditions it holds; if not applicable, the one that is violated and by how much.

    Examples
    --------
    >>> Bound("mean_ttft", 2.9, "s", "upper", "E[W]/λ + T/2 + T", "arXiv 2504.11320", "λT < n")
    mean_ttft ≤ 2.9 s (λT < n)
    >>> Bound.not_applicable("mean_ttft", "s", "upper", "E[W]/λ + T/2 + T", "arXiv 2504.11320", "λT > n")
    mean_ttft: not applicable, λT > n
    """

    name: str
    value: float | None
    unit: str
    direction: Literal["upper", "lower"]
    formula: str
    source: str
    condition: str

    def __post_init__(self) -> None:
        check_choice("direction", self.direction, ("upper", "lower"))
        if self.value is not None:
            object.__setattr__(self, "value", check_real("value", self.value, allow_inf=True))

    @classmethod
    def not_applicable(
        cls,
        name: str,
        unit: str,
        direction: Literal["upper", "lower"],
        formula: str,
        source: str,
        violated: str,
    ) -> Bound:
        """The bound without a number: `violated` says which condition fails, with the figures."""
        return cls(name, None, unit, direction, formula, source, violated)

    @property
    def applies(self) -> bool:
        """Whether there is a number."""
        return self.value is not None

    def __repr__(self) -> str:
        if self.value is None:
            return f"{self.name}: not applicable, {self.condition}"
        sign = "≤" if self.direction == "upper" else "≥"
        return f"{self.name} {sign} {self.value:.6g} {self.unit} ({self.condition})".replace("  ", " ")
