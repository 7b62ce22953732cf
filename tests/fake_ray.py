"""A stand-in for the module `ray` whose actors live in this process and do one thing after the other; they die when a test says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any


class RayError(Exception):
    pass


class RayActorError(RayError):
    pass


class LocalRayletDiedError(RayError):
    pass


class RayTaskError(RayError):
    def __init__(self, cause: Exception):
        super().__init__(str(cause))
        self.cause = cause


class Killed(BaseException):
    """Raised inside an actor: it dies there."""


@dataclass(eq=False)
class Reference:
    """What an actor was asked."""

    actor: Actor
    name: str
    args: tuple[Any, ...]
    answer: Callable[[], Any] | None = None


@dataclass(eq=False)
class Actor:
    number: int
    create: Callable[[], Any]
    made: Any = None
    is_dead: bool = False

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *args: Reference(self, name, args))


def raising(error: RayError) -> Callable[[], Any]:
    def answer() -> Any:
        raise error

    return answer


@dataclass
class FakeRay(ModuleType):
    """The functions of Ray that the executor calls.

    `on_call` sees every call before it is made and may raise `Killed` or an error of Ray.
    """

    gpus: int = 0
    cpus: tuple[int, ...] = (4,)
    on_call: Callable[[Reference], None] = lambda reference: None
    actors: list[Actor] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    killed: list[int] = field(default_factory=list)
    __version__ = "0"

    def __post_init__(self) -> None:
        super().__init__("ray")
        self.exceptions = ModuleType("ray.exceptions")
        for error in (RayError, RayActorError, LocalRayletDiedError, RayTaskError):
            setattr(self.exceptions, error.__name__, error)

    def is_initialized(self) -> bool:
        return True

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": float(sum(self.cpus))} | ({"GPU": float(self.gpus)} if self.gpus else {})

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": float(cpus)}} for cpus in self.cpus]

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: "node 1")

    def remote(self, **asked: Any) -> Callable[[type], Any]:
        self.asked.append(asked)

        def wrap(kind: type) -> Any:
            return SimpleNamespace(remote=lambda **told: self._hire(lambda: kind(**told)))

        return wrap

    def _hire(self, make: Callable[[], Any]) -> Actor:
        self.actors.append(Actor(len(self.actors), make))
        return self.actors[-1]

    def wait(self, references: list[Reference], num_returns: int, timeout: float) -> tuple[list[Reference], list[Reference]]:
        assert references, "Ray refuses to wait for nothing"
        ready = references[:num_returns]
        for reference in ready:
            reference.answer = self._do(reference)
        return ready, [reference for reference in references if reference not in ready]

    def get(self, reference: Reference) -> Any:
        assert reference.answer is not None, "it would wait"
        return reference.answer()

    def _do(self, reference: Reference) -> Callable[[], Any]:
        actor = reference.actor
        if actor.is_dead:
            return raising(RayActorError("The actor is dead."))
        try:
            self.on_call(reference)
            actor.made = actor.made or actor.create()
            found = getattr(actor.made, reference.name)(*reference.args)
        except Killed:
            actor.is_dead = True
            return raising(RayActorError("The actor died unexpectedly before finishing this task.\n\tclass_name: Worker"))
        except RayError as error:
            return raising(error)
        except Exception as error:
            return raising(RayTaskError(error))
        return lambda: found

    def kill(self, actor: Actor, no_restart: bool) -> None:
        assert no_restart
        actor.is_dead = True
        self.killed.append(actor.number)
