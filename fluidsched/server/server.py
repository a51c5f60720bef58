"""One inference server: the memory it has for KV, its limits on a batch, and the time an iteration takes.

With paged KV of `block_size` b tokens the server has ⌊C/b⌋ blocks, and a request with m tokens of KV holds
⌈m/b⌉ of them; without, both are counted in single tokens.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fluidsched import _files
from fluidsched._checks import LARGEST_COUNT, check_count, check_keys, check_real, check_scale
from fluidsched.errors import InputError
from fluidsched.server.iteration import IterationTime

__all__ = ["Server"]

SCHEMA = "fluidsched.server/1"


_OPTIONAL = ("swap_bandwidth", "max_model_len", "waiting_timeout", "total_timeout")
"""Fields that a file leaves out where they are None."""


@dataclass(frozen=True, repr=False)
class Server:
    """KV capacity, iteration time and limits of one server.

    Parameters
    ----------
    kv_capacity : int or float
        KV tokens that fit in memory, C. `math.inf` for no limit.
    iteration_time : IterationTime
        Duration of an iteration, s.
    max_batch_size : int, optional
        Most requests in one iteration. None: unlimited.
    token_budget : int, optional
        Most tokens (prefilled and decoded) in one iteration. None: unlimited.
    block_size : int, optional
        Tokens per KV block. None: KV is counted in single tokens.
    swap_bandwidth : float, optional
        KV tokens per second that move between the GPU's memory and the host's, either way; tables that
        preempt by swapping need it. None: unknown.
    max_model_len : int, optional
        Most tokens of one request, prompt and output together. The simulator cuts outputs that would be
        longer, as vLLM does, and turns away prompts that leave no room for a token; the fluid program takes
        lengths as the workload states them. None: no limit.
    waiting_timeout, total_timeout : float, optional
        Seconds after its arrival at which a request that was never admitted, or any request that has not
        finished, is aborted by the server. The simulator does so; the fluid program takes all requests as
        served. None: never.
    name, source : str, optional
        A label for reports, and where the numbers come from.

    Raises
    ------
    InputError
        If a limit is not positive, or `kv_capacity` does not hold one block.

    Examples
    --------
    >>> server = Server(137_000, IterationTime.paper(d0=0.01, d1=3.3e-7), block_size=16)
    >>> server.kv_blocks
    8562
    >>> server.block_rounded([1, 16, 17]).tolist()
    [16.0, 16.0, 32.0]
    """

    kv_capacity: float
    iteration_time: IterationTime
    max_batch_size: int | None = None
    token_budget: int | None = None
    block_size: int | None = None
    _: KW_ONLY
    name: str = "server"
    source: str = ""
    swap_bandwidth: float | None = None
    max_model_len: int | None = None
    waiting_timeout: float | None = None
    total_timeout: float | None = None

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_field(
            self, "kv_capacity", check_scale("kv_capacity", self.kv_capacity, zero=False, allow_inf=True)
        )
        if not isinstance(self.iteration_time, IterationTime):
            raise InputError(
                "iteration_time",
                self.iteration_time,
                "be an IterationTime",
                "Make one with IterationTime.affine, .paper, .two_piece, .pieces or .function.",
            )
        for limit in ("max_batch_size", "token_budget", "block_size"):
            value = getattr(self, limit)
            if value is not None:
                set_field(self, limit, check_count(limit, value, minimum=1, maximum=LARGEST_COUNT))
        if self.max_model_len is not None:
            set_field(
                self,
                "max_model_len",
                check_count("max_model_len", self.max_model_len, minimum=2, maximum=LARGEST_COUNT),
            )
        for name in ("swap_bandwidth", "waiting_timeout", "total_timeout"):
            value = getattr(self, name)
            if value is not None:
                set_field(self, name, check_scale(name, value, zero=False))
        if self.block_size is not None and self.kv_capacity < self.block_size:
            raise InputError(
                "kv_capacity", self.kv_capacity, f"hold at least one block of {self.block_size:,} tokens"
            )
        for text in ("name", "source"):
            if not isinstance(getattr(self, text), str):
                raise InputError(text, getattr(self, text), "be a string")

    @classmethod
    def from_model_config(
        cls,
        iteration_time: IterationTime,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        parameters: float,
        gpu_memory_bytes: float,
        tensor_parallel: int = 1,
        memory_utilization: float = 0.9,
        weight_bytes_per_parameter: float = 2.0,
        kv_bytes_per_element: float = 2.0,
        max_batch_size: int | None = None,
        token_budget: int | None = None,
        block_size: int | None = None,
        name: str = "server",
    ) -> Server:
        """Compute the KV capacity from a model's dimensions and the GPUs' memory.

        A token's keys and values take 2·layers·kv_heads·head_dim elements; what the weights leave of the
        usable memory of all GPUs together is KV.

        Parameters
        ----------
        iteration_time : IterationTime
            Duration of an iteration, s.
        layers, kv_heads, head_dim : int
            Of the model; kv_heads is smaller than the number of heads with grouped queries.
        parameters : float
            Number of weights kept in GPU memory.
        gpu_memory_bytes : float
            Of one GPU.
        tensor_parallel : int
            GPUs that share the model.
        memory_utilization : float
            Fraction of the memory that weights and KV may take.
        weight_bytes_per_parameter, kv_bytes_per_element : float
            2 for 16-bit, 1 for 8-bit formats.
        max_batch_size, token_budget, block_size, name
            As for `Server`.

        Raises
        ------
        InputError
            If an argument is wrong, or the weights leave no room.

        Examples
        --------
        Llama-2-7B on an 80 GiB card, its weights without embeddings:

        >>> server = Server.from_model_config(
        ...     IterationTime.paper(0.01, 3e-7), layers=32, kv_heads=32, head_dim=128,
        ...     parameters=6.476e9, gpu_memory_bytes=80 * 2**30,
        ... )
        >>> server.kv_capacity
        122752.0
        """
        elements = 2
        for argument, count in (("layers", layers), ("kv_heads", kv_heads), ("head_dim", head_dim)):
            elements *= check_count(argument, count, minimum=1)
        per_token = elements * check_real("kv_bytes_per_element", kv_bytes_per_element, above=0.0)
        memory = (
            check_count("tensor_parallel", tensor_parallel, minimum=1)
            * check_real("gpu_memory_bytes", gpu_memory_bytes, above=0.0)
            * check_real("memory_utilization", memory_utilization, above=0.0, maximum=1.0)
        )
        weights = check_real("parameters", parameters, above=0.0) * check_real(
            "weight_bytes_per_parameter", weight_bytes_per_parameter, above=0.0
        )
        tokens = math.floor((memory - weights) / per_token)
        if tokens < 1:
            raise InputError(
                "parameters",
                f"{weights / 1e9:.4g} GB of weights",
                f"leave room for KV in {memory / 1e9:.4g} GB",
                "Raise tensor_parallel or memory_utilization.",
            )
        return cls(tokens, iteration_time, max_batch_size, token_budget, block_size, name=name)

    @property
    def kv_blocks(self) -> int | None:
        """⌊C/b⌋; None without `block_size` or with unlimited memory."""
        if self.block_size is None or math.isinf(self.kv_capacity):
            return None
        return math.floor(self.kv_capacity / self.block_size)

    @property
    def usable_kv_capacity(self) -> float:
        """KV tokens that can be held at once: `kv_capacity`, or whole blocks of it."""
        if self.kv_blocks is None or self.block_size is None:
            return self.kv_capacity
        return float(self.kv_blocks * self.block_size)

    def block_rounded(self, tokens: ArrayLike) -> NDArray[np.float64]:
        """Tokens of memory a request with this many KV tokens takes: rounded up to whole blocks."""
        held = np.asarray(tokens, dtype=np.float64)
        if self.block_size is None:
            return held
        return np.asarray(np.ceil(held / self.block_size) * self.block_size, dtype=np.float64)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that defines the server, names included."""
        return _files.fingerprint(self.to_dict())

    def __repr__(self) -> str:
        parts = [f"kv_capacity={self.kv_capacity:,.0f} tokens"]
        for limit, unit in (
            ("max_batch_size", "requests"),
            ("token_budget", "tokens"),
            ("block_size", "tokens"),
        ):
            value = getattr(self, limit)
            if value is not None:
                parts.append(f"{limit}={value:,} {unit}")
        source = f"\n  source: {self.source}" if self.source else ""
        return f"Server({self.name!r}, {', '.join(parts)}\n  {self.iteration_time!r}{source})"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, schema first."""
        data = {
            "schema": SCHEMA,
            "name": self.name,
            "source": self.source,
            "kv_capacity": _files.to_jsonable(self.kv_capacity),
            "max_batch_size": self.max_batch_size,
            "token_budget": self.token_budget,
            "block_size": self.block_size,
            "iteration_time": self.iteration_time.to_dict(),
        }
        optional = {name: getattr(self, name) for name in _OPTIONAL}
        return data | {name: value for name, value in optional.items() if value is not None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], argument: str = "server") -> Server:
        """Read what `to_dict` wrote; anything else is an `InputError` naming the field."""
        names = (
            "name",
            "source",
            "kv_capacity",
            "max_batch_size",
            "token_budget",
            "block_size",
            "iteration_time",
        )
        values = check_keys(argument, data, SCHEMA, names, _OPTIONAL)
        if values["kv_capacity"] == "inf":
            values["kv_capacity"] = math.inf
        iteration_time = IterationTime.from_dict(values.pop("iteration_time"), f"{argument}.iteration_time")
        return cls(iteration_time=iteration_time, **values)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the JSON text, and write it to `path` (whole or not at all) if one is given."""
        text = _files.dumps(self.to_dict())
        if path is not None:
            _files.write_whole(path, text)
        return text

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Server:
        """Read the file `to_json` wrote."""
        return cls.from_dict(_files.loads(str(path), _files.read_text("server", path)))
