"""The stability region: all offered rates the server can carry in the fluid limit.

Eliminating the iteration rate u leaves conditions linear in the offered rates λ, one for each way a
resource and the time rows can meet (module `closed_forms`), so the region is the polytope

    { λ ≥ 0 :  g_h·λ ≤ 1,  h = 1..H },

and the load of a resource is the largest g_h·λ among its half-spaces. The boundary along any ray is a
division, the boundary of two types an intersection of half-planes, and the distance of a stable point to
the boundary the smallest (1 − g_h·λ)/‖g_h‖: all exact, none needs a solver.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fluidsched import _files
from fluidsched._checks import check_choice
from fluidsched._display import Tabular
from fluidsched.errors import InputError
from fluidsched.fluid.model import TOLERANCE, build_model
from fluidsched.server import Server
from fluidsched.workload import Workload

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = ["StabilityRegion", "stability_region"]

SCHEMA = "fluidsched.stability-region/1"


@dataclass(frozen=True, eq=False, repr=False)
class StabilityRegion(Tabular):
    """A polytope of offered rates, made by `stability_region`. J types, H half-spaces.

    Attributes
    ----------
    type_names : tuple of str
        The J axes.
    normals : ndarray of shape (H, J)
        g_h, s: load per request per second.
    resources : tuple of str
        What each half-space belongs to, shape (H,).
    """

    type_names: tuple[str, ...]
    normals: NDArray[np.float64]
    resources: tuple[str, ...]

    def load(self, arrival_rate: ArrayLike) -> NDArray[np.float64]:
        """Return the largest g_h·λ: at most 1 in the region.

        Parameters
        ----------
        arrival_rate : array_like of shape (..., J)
            Requests per second.
        """
        return np.asarray((self._rates(arrival_rate) @ self.normals.T).max(axis=-1))

    def contains(self, arrival_rate: ArrayLike) -> NDArray[np.bool_]:
        """Return whether rates of shape (..., J), req/s, lie in the region, boundary included."""
        return np.asarray(self.load(arrival_rate) <= 1.0 + TOLERANCE)

    def critical_rate(self, mix: ArrayLike) -> NDArray[np.float64]:
        """Return the largest total rate of a mix, req/s: where its ray leaves the region.

        Parameters
        ----------
        mix : array_like of shape (..., J)
            Non-negative weights, not all zero; only their proportions matter.
        """
        weights = self._rates(mix)
        total = weights.sum(axis=-1)
        if np.any(total == 0.0):
            raise InputError("mix", "all zero", "have a positive sum")
        with np.errstate(divide="ignore"):
            return np.asarray(total / self.load(weights))

    def limiting_resource(self, mix: ArrayLike) -> str:
        """Return the resource that runs out first as this mix, shape (J,), grows."""
        return self.resources[int(np.argmax(self.normals @ self._rates(mix)))]

    def distance(self, arrival_rate: ArrayLike) -> NDArray[np.float64]:
        """Return the Euclidean distance of stable rates to instability, req/s.

        The length of the shortest change of rates that leaves the region. Negative outside: minus the
        distance to the half-space violated most, at most the distance to the region.

        Parameters
        ----------
        arrival_rate : array_like of shape (..., J)
            Requests per second.
        """
        slack = 1.0 - self._rates(arrival_rate) @ self.normals.T
        return np.asarray((slack / np.linalg.norm(self.normals, axis=-1)).min(axis=-1))

    def boundary(self, first: str, second: str, others: ArrayLike | None = None) -> NDArray[np.float64]:
        """Return the exact outline of the region in two types.

        Parameters
        ----------
        first, second : str
            Names of the types on the axes.
        others : array_like of shape (J,), optional
            Rates at which the other types stay, req/s (the entries of the two are ignored); default 0.

        Returns
        -------
        ndarray of shape (V, 2)
            Vertices from the one on the first axis to the one on the second, req/s, without the origin:
            straight lines between them are the boundary.

        Raises
        ------
        InputError
            If a name is unknown, both are the same, the others alone are unstable, or a type uses nothing.

        Examples
        --------
        >>> import fluidsched as fs
        >>> workload = fs.Workload([fs.RequestType("a", 1.0, 10, 10), fs.RequestType("b", 1.0, 20, 20)])
        >>> server = fs.Server(580, fs.IterationTime.affine(1.0, 0.0, 0.0, 0.0))
        >>> stability_region(workload, server).boundary("a", "b").tolist()
        [[4.0, 0.0], [0.0, 0.9830508474576272]]
        """
        axes = [
            self.type_names.index(check_choice(argument, name, self.type_names))
            for argument, name in (("first", first), ("second", second))
        ]
        if axes[0] == axes[1]:
            raise InputError("second", second, "be another type than first")
        fixed = np.zeros(len(self.type_names)) if others is None else self._rates(others).copy()
        fixed[axes] = 0.0
        room = 1.0 - self.normals @ fixed
        if room.min() <= 0.0:
            raise InputError("others", others, "be stable by themselves")
        planes = self.normals[:, axes] / room[:, None]
        if np.any(planes.max(axis=0) == 0.0):
            raise InputError("first and second", (first, second), "both use the server")
        return _outline(planes)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per half-space: its resource, then the load per request per second of each type, s."""
        import pandas as pd

        frame = pd.DataFrame(self.normals, columns=list(self.type_names))
        frame.insert(0, "resource", list(self.resources))
        return frame

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, schema first: half-spaces g·λ ≤ 1 with their resources."""
        answer: dict[str, Any] = _files.to_jsonable(
            {
                "schema": SCHEMA,
                "types": list(self.type_names),
                "normals_s": self.normals,
                "resources": list(self.resources),
            }
        )
        return answer

    def plot(self, first: str, second: str, others: ArrayLike | None = None, ax: Axes | None = None) -> Axes:
        """Draw the region in two types; see `fluidsched.plots.stability_boundary`."""
        from fluidsched import plots

        return plots.stability_boundary(self, first, second, others=others, ax=ax)

    def __repr__(self) -> str:
        alone = 1.0 / np.where(self.normals.max(axis=0) > 0.0, self.normals.max(axis=0), np.nan)
        lines = [f"StabilityRegion: {len(self.normals)} half-spaces in {len(self.type_names)} types"]
        for name, rate, row in zip(self.type_names, alone, self.normals.argmax(axis=0), strict=True):
            lines.append(f"  {name}: alone up to {rate:.4g} req/s ({self.resources[row]})")
        return "\n".join(lines)

    def _rates(self, rate: ArrayLike) -> NDArray[np.float64]:
        array = np.asarray(rate, dtype=np.float64)
        if array.ndim == 0 or array.shape[-1] != len(self.type_names):
            raise InputError(
                "rates", f"shape {array.shape}", f"have one rate per type, {len(self.type_names)}"
            )
        if not (np.isfinite(array).all() and (array >= 0.0).all()):
            raise InputError("rates", rate, "be finite and non-negative")
        return array


def stability_region(
    workload: Workload,
    server: Server,
    *,
    max_iteration_time: float | None = None,
    chunk_tokens: int | None = None,
) -> StabilityRegion:
    """Return the stability region of a workload's types; its rates do not matter.

    Half-spaces that another one makes superfluous everywhere are left out.

    Parameters
    ----------
    workload : Workload
        J types.
    server : Server
        With a piecewise-affine iteration time.
    max_iteration_time, chunk_tokens : optional
        As for `FluidProgram`.

    Examples
    --------
    >>> import fluidsched as fs
    >>> workload = fs.Workload([fs.RequestType("chat", 1.0, 512, 128), fs.RequestType("sum", 1.0, 4000, 200)])
    >>> region = stability_region(workload, fs.catalog.server("a100", "llama-2-7b"))
    >>> bool(region.contains([4.0, 0.5])), region.limiting_resource([4.0, 0.5])
    (True, 'kv')
    """
    model = build_model(workload, server, max_iteration_time=max_iteration_time, chunk_tokens=chunk_tokens)
    normals = model.halfspaces
    kept: list[int] = []
    for h, normal in enumerate(normals):
        # Superfluous: nowhere above another (of equal ones the first stays).
        below = np.all(normals >= normal, axis=1)
        equal = np.all(normals == normal, axis=1)
        if not np.any(below & ~equal) and not np.any(equal[:h]):
            kept.append(h)
    chosen = normals[kept]
    chosen.setflags(write=False)
    return StabilityRegion(workload.type_names, chosen, tuple(model.halfspace_resources[h] for h in kept))


def _outline(planes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Vertices of {x ≥ 0, planes·x ≤ 1} but the origin, from the first axis to the second."""
    ends = 1.0 / planes.max(axis=0)
    scaled = planes * ends  # the region now reaches 1 on both axes
    lines = np.vstack([scaled, np.eye(2)])
    right = np.append(np.ones(len(planes)), [0.0, 0.0])
    points = []
    for i in range(len(planes)):
        for k in range(i + 1, len(lines)):
            if abs(np.linalg.det(lines[[i, k]])) > TOLERANCE:
                x = np.linalg.solve(lines[[i, k]], right[[i, k]])
                if np.all(x >= -TOLERANCE) and np.all(scaled @ x <= 1.0 + TOLERANCE):
                    points.append(np.maximum(x, 0.0))
    ordered = sorted(points, key=lambda x: float(np.arctan2(x[1], x[0])))
    distinct = [ordered[0]]
    for x in ordered[1:]:
        if np.abs(x - distinct[-1]).max() > TOLERANCE:
            distinct.append(x)
    return np.asarray(np.array(distinct) * ends)
