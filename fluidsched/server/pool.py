"""Replicas of one server: what fleets are made of, for the fluid program and for the simulator alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from fluidsched._checks import check_choice, check_real
from fluidsched.errors import InputError
from fluidsched.server.server import Server

__all__ = ["Pool", "Stage"]

Stage = Literal["whole", "prefill", "decode"]


@dataclass(frozen=True, repr=False)
class Pool:
    """Replicas of one server.

    Parameters
    ----------
    server : Server
        One replica, with a piecewise-affine iteration time.
    replicas : float
        How many; fractions of one are allowed.
    stage : {"whole", "prefill", "decode"}
        What it does of a request.
    max_iteration_time : float, optional
        Upper limit on its mean iteration time, s.
    name : str, optional
        Default: the server's name.
    """

    server: Server
    replicas: float = 1.0
    stage: Stage = "whole"
    max_iteration_time: float | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.server, Server):
            raise InputError("server", self.server, "be a Server")
        object.__setattr__(self, "replicas", check_real("replicas", self.replicas, minimum=0.0))
        check_choice("stage", self.stage, get_args(Stage))
        if not self.name:
            object.__setattr__(self, "name", self.server.name)

    def __repr__(self) -> str:
        limit = "" if self.max_iteration_time is None else f", iterations up to {self.max_iteration_time:g} s"
        stage = "" if self.stage == "whole" else f", {self.stage} only"
        own = f" of {self.server.name!r}" if self.name != self.server.name else ""
        return f"Pool {self.name!r}: {self.replicas:g} replica{'s' if self.replicas != 1.0 else ''}{own}{stage}{limit}"
