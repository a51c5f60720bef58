"""What is asked of the server: request types, workloads, arrival paths, traces.

A `Workload` is a mixture of `RequestType`s, each with an arrival rate and a joint law of prompt and output
length; `Workload.sample` draws an `ArrivalPath` from it, `read_trace` reads one from a file, and
`ArrivalPath.to_workload` goes back from a path to a workload. Length laws are made by `fluidsched.lengths`,
arrival processes by `fluidsched.arrivals`, predicted lengths by `fluidsched.predictions`, how long clients
stay by `fluidsched.patience`, workloads of public traces by `fluidsched.workloads`. `UserSequences` are what users
who wait for their answers will ask.
"""

from fluidsched.workload.model import RequestType, Workload
from fluidsched.workload.path import ArrivalPath
from fluidsched.workload.traces import read_trace
from fluidsched.workload.users import UserSequences

__all__ = ["ArrivalPath", "RequestType", "UserSequences", "Workload", "read_trace"]
