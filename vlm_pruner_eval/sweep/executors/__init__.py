"""Where the runs of a sweep are made: in this process, in several on this machine, on a Ray cluster, as
shards, or as the ranks of torchrun.
"""

from __future__ import annotations

from vlm_pruner_eval.errors import ConfigError, closest
from vlm_pruner_eval.lmms.plan import Part
from vlm_pruner_eval.sweep.executors.base import Executor, Work
from vlm_pruner_eval.sweep.executors.local import Local
from vlm_pruner_eval.sweep.executors.on_ray import RayExecutor
from vlm_pruner_eval.sweep.executors.shard import Shard

EXECUTORS = ("local", "ray")

__all__ = ["EXECUTORS", "Executor", "Local", "RayExecutor", "Shard", "Work", "choose"]


def choose(
    name: str | None,
    *,
    processes: int | None,
    shard: Part | None,
    is_rank: bool,
    address: str | None = None,
    parts: int | None = None,
) -> Executor | None:
    """The executor of a command line; None where torchrun or the shard decides.

    Raises
    ------
    ConfigError
        An unknown name, or options that exclude each other.
    """
    if name is not None and name not in EXECUTORS:
        raise ConfigError(f"--executor: got {name!r}, which is unknown; {closest(name, EXECUTORS)}")
    if name != "ray" and (others := [option for option, value in (("--address", address), ("--parts", parts)) if value is not None]):
        raise ConfigError(f"{others[0]}: got it without --executor ray, which alone has a meaning for it; leave it out.")
    if name == "ray":
        for option, value in (("--processes", processes), ("--parts", parts)):
            if value is not None and value < 1:
                raise ConfigError(f"{option}: got {value}, expected 1 or more.")
    given = {"--executor": name, "--processes": processes, "--shard": shard}
    if is_rank and (others := [option for option, value in given.items() if value is not None]):
        raise ConfigError(f"{others[0]}: got it under torchrun, whose ranks answer every run together; leave it out.")
    if shard is not None and (others := [option for option in ("--executor", "--processes") if given[option] is not None]):
        raise ConfigError(f"{others[0]}: got it with --shard, which is one process; start as many shards instead.")
    if is_rank or shard is not None:
        return None
    return RayExecutor(address, processes, parts) if name == "ray" else Local(processes)
