"""The stability region against the program itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
from fluid_cases import servers, workloads
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import fluidsched as fs
from fluidsched.errors import InputError
from fluidsched.fluid.region import stability_region


@settings(max_examples=40)
@given(workloads(), servers(), st.one_of(st.none(), st.floats(1.05, 30.0)), st.randoms(use_true_random=False))
def test_region_is_what_the_program_admits(
    workload: fs.Workload, server: fs.Server, slowest: float | None, random: object
) -> None:
    """Inside the program admits all, outside it does not, along random rays, with an iteration target or not."""
    limit = None if slowest is None else slowest * server.iteration_time.empty
    region = stability_region(workload, server, max_iteration_time=limit)
    program = fs.FluidProgram(workload, server, max_iteration_time=limit)
    mix = np.array([random.random() for _ in workload.types])  # type: ignore[attr-defined]
    mix[mix < 1e-12] = 0.0  # subnormal rates cannot be told from none
    assume(mix.sum() > 0.1)
    critical = float(region.critical_rate(mix))
    assume(math.isfinite(critical))
    boundary = mix / mix.sum() * critical
    inside, outside = (program.solve(boundary * x) for x in (1 - 1e-6, 1 + 1e-6))
    assert inside.admitted_fraction.min() == 1.0
    assert outside.admitted_rate.sum() < outside.arrival_rate.sum() * (1 - 1e-9)
    assert bool(region.contains(boundary * (1 - 1e-6)))
    assert not bool(region.contains(boundary * (1 + 1e-6)))
    np.testing.assert_allclose(region.load(boundary), inside.load.max() / (1 - 1e-6), rtol=1e-9)
    assert region.limiting_resource(mix) in inside.resources


@settings(max_examples=30)
@given(workloads(max_types=3), servers())
def test_outline_of_two_types(workload: fs.Workload, server: fs.Server) -> None:
    """Every vertex and every middle of an edge has load 1; the chain is convex and runs from axis to axis."""
    assume(len(workload) >= 2)
    region = stability_region(workload, server)
    assume(np.all(region.normals.max(axis=0) > 0))
    a, b = workload.type_names[:2]
    outline = region.boundary(a, b)
    assert outline[0, 1] == pytest.approx(0, abs=1e-9 * outline[:, 1].max())
    assert outline[-1, 0] == pytest.approx(0, abs=1e-9 * outline[:, 0].max())
    points = np.vstack([outline, (outline[:-1] + outline[1:]) / 2])
    rates = np.zeros((len(points), len(workload)))
    rates[:, :2] = points
    np.testing.assert_allclose(region.load(rates), 1.0, rtol=1e-7)


def test_distance_is_the_shortest_way_out() -> None:
    """No change shorter than the distance leaves the region; the change along the nearest normal just does."""
    workload = fs.Workload([fs.RequestType("chat", 3.0, 512, 128), fs.RequestType("sum", 0.3, 4000, 200)])
    region = stability_region(workload, fs.catalog.server("a100", "llama-2-7b"))
    rate = workload.arrival_rate
    distance = float(region.distance(rate))
    rng = np.random.default_rng(1)
    steps = rng.normal(size=(2000, 2))
    steps *= distance / np.linalg.norm(steps, axis=1, keepdims=True)
    assert np.all(region.contains(np.maximum(rate + steps * (1 - 1e-9), 0)))
    slack = (1 - region.normals @ rate) / np.linalg.norm(region.normals, axis=1)
    normal = region.normals[slack.argmin()]
    out = rate + distance * (1 + 1e-6) * normal / np.linalg.norm(normal)
    assert not bool(region.contains(out))
    assert float(region.distance(out)) < 0


def test_outline_with_a_third_type_present() -> None:
    """Fixing another type's rate shrinks the outline; a fixed rate that is unstable alone is refused."""
    types = [
        fs.RequestType(name, 1.0, p, o) for name, p, o in (("a", 500, 100), ("b", 50, 400), ("c", 900, 9))
    ]
    workload, server = fs.Workload(types), fs.catalog.server("a100", "llama-2-7b")
    region = stability_region(workload, server)
    free, taken = region.boundary("a", "b"), region.boundary("a", "b", [9.0, 9.0, 2.0])
    assert taken[0, 0] < free[0, 0]
    assert float(region.load([taken[0, 0], 0.0, 2.0])) == pytest.approx(1.0)
    with pytest.raises(InputError, match="others"):
        region.boundary("a", "b", [0.0, 0.0, 1e4])


def test_superfluous_halfspaces_are_left_out() -> None:
    """No half-space lies below another one; dropping them changes no load."""
    workload = fs.Workload([fs.RequestType("chat", 3.0, 512, 128), fs.RequestType("sum", 0.3, 4000, 200)])
    server = fs.catalog.server("a100", "llama-2-7b")
    region = stability_region(workload, server)
    model = fs.FluidProgram(workload, server).model
    assert len(region.normals) < len(model.halfspaces)
    rates = np.random.default_rng(0).uniform(0, 5, (100, 2))
    np.testing.assert_allclose(region.load(rates), model.load(rates).max(axis=-1), rtol=1e-14)
    assert region.to_frame()["resource"].tolist() == list(region.resources)
    assert "chat: alone up to" in repr(region)


def test_wrong_arguments_are_named() -> None:
    """Unknown or equal names, wrong shapes, mixes of nothing, types that use nothing."""
    workload = fs.Workload([fs.RequestType("a", 1.0, 1, 1), fs.RequestType("b", 1.0, 10, 10)])
    region = stability_region(workload, fs.Server(1000, fs.IterationTime.paper(0.01, 1e-6)))
    with pytest.raises(InputError, match="second"):
        region.boundary("a", "c")
    with pytest.raises(InputError, match="another type"):
        region.boundary("a", "a")
    with pytest.raises(InputError, match="shape"):
        region.load([1.0])
    with pytest.raises(InputError, match="non-negative"):
        region.load([1.0, -1.0])
    with pytest.raises(InputError, match="positive sum"):
        region.critical_rate([0.0, 0.0])
    free = stability_region(workload, fs.Server(math.inf, fs.IterationTime.affine(0.01, 0, 0, 1e-6)))
    with pytest.raises(InputError, match="use the server"):
        free.boundary("a", "b")
    assert float(free.critical_rate([1.0, 0.0])) == math.inf


def test_plot() -> None:
    """The exact outline, on the axes given, with units."""
    from matplotlib import pyplot

    workload = fs.Workload([fs.RequestType("chat", 3.0, 512, 128), fs.RequestType("sum", 0.3, 4000, 200)])
    region = stability_region(workload, fs.catalog.server("a100", "llama-2-7b"))
    _, axes = pyplot.subplots()
    assert region.plot("chat", "sum", ax=axes) is axes
    np.testing.assert_array_equal(np.column_stack(axes.lines[0].get_data()), region.boundary("chat", "sum"))
    assert axes.get_xlabel() == "chat (req/s)"
    pyplot.close(axes.figure)
