"""The workers of a Ray cluster as the driver sees them: which run or share each of them has, and what becomes of it if one dies."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from types import ModuleType
from typing import Any

from vlm_pruner_eval.errors import ConfigError, StoppedError
from vlm_pruner_eval.lmms.plan import Part
from vlm_pruner_eval.sweep import images, provenance
from vlm_pruner_eval.sweep.executors.base import Work
from vlm_pruner_eval.sweep.executors.watch import Watch
from vlm_pruner_eval.sweep.files import write_atomic
from vlm_pruner_eval.sweep.grid import Run
from vlm_pruner_eval.sweep.score_line import title
from vlm_pruner_eval.sweep.session import record_lost, without_model

MOST_DEATHS = 3  # of workers at one run or share; and before they had loaded the model, in a row
_LOOK_S, _LONG_S, _LEAVE_S = 1.0, 60.0, 5.0


@dataclass(frozen=True)
class Task:
    """A run to be made, or a share of its answers."""

    run: Run
    part: Part | None = None

    @property
    def name(self) -> str:
        """For people."""
        return self.run.key if self.part is None else f"{self.run.key}, share {self.part}"


@dataclass(eq=False)
class Member:
    """One worker.

    Attributes
    ----------
    actor
        Ray's handle of a `ray_worker.Worker`.
    host
        Where it is; None until it has loaded the model.
    sees_results
        Whether it works in the driver's results directory.
    task
        What it does.
    """

    actor: Any
    host: str | None = None
    sees_results: bool = False
    task: Task | None = None


@dataclass
class Crew:
    """Makes the runs of a sweep with workers that it hires.

    Parameters
    ----------
    ray
        The module.
    work
        What is to be done.
    hire
        Starts a worker.
    size
        Workers at a time.
    parts
        Shares of every run; None: several where fewer runs than workers are left, 1 otherwise.
    """

    ray: ModuleType
    work: Work
    hire: Callable[[], Any]
    size: int
    parts: int | None
    queue: deque[Task] = field(default_factory=deque)
    idle: list[Member] = field(default_factory=list)
    busy: dict[Any, Member] = field(default_factory=dict)  # by the reference to what they will answer; without a task, they start
    _deaths: Counter[str] = field(default_factory=Counter)  # by the name of a task
    _shares: Counter[str] = field(default_factory=Counter)  # of the runs that were split, those that are not answered yet
    _begun: set[str] = field(default_factory=set)
    _stillborn: int = 0
    _is_open: bool = False
    _waiting_since: float = field(default_factory=time.monotonic)

    def run(self) -> None:
        """Until nothing is left to do.

        Raises
        ------
        ConfigError
            A worker can't do what is asked.
        StoppedError
            A full disk, workers that die before they can begin, an error that is not a run's.
        """
        self.queue.extend(map(Task, self.work.todo))
        for _ in range(self.size):
            self._hire()
        with Watch(self.work) as self._watch:
            while self.queue or any(member.task for member in self.busy.values()):
                self.work.check()
                self._hand_out()
                done, _ = self.ray.wait(list(self.busy), num_returns=1, timeout=_LOOK_S) if self.busy else ([], [])
                for reference in done:
                    self._take(reference)
                self._watch.look()
                self._say_if_none_starts()
        self._part()

    def _hire(self) -> None:
        actor = self.hire()
        self.busy[actor.ready.remote()] = Member(actor)

    def _team(self) -> list[Member]:
        """Those that have loaded the model."""
        return [member for member in (*self.idle, *self.busy.values()) if member.host is not None]

    # ---- what is next
    def _hand_out(self) -> None:
        self._split()
        for member in list(self.idle):
            task = next((task for task in self.queue if member.sees_results or task.run.run_id not in self._shares), None)
            if task is not None:
                self.idle.remove(member)
                self.queue.remove(task)
                self._give(member, task)
        if self.queue and not self.busy:
            raise StoppedError(
                f"No worker that sees {self.work.store.root} is left, which shares of a run need; the same command goes on with others."
            )

    def _give(self, member: Member, task: Task) -> None:
        run_id, part = task.run.run_id, task.part
        if run_id not in self._begun:
            self._begun.add(run_id)
            self._watch.begun(task.run)
        member.task = task
        make, share = member.actor.make, member.actor.answer_share
        self.busy[make.remote(run_id) if part is None else share.remote(run_id, part.index, part.count)] = member

    def _split(self) -> None:
        """Make shares of the runs that nobody has begun, if there are fewer of them than workers; those need one directory."""
        whole = [task for task in self.queue if task.part is None and task.run.run_id not in self._begun]
        team = self._team()
        if not whole or not team or not all(member.sees_results for member in team):
            return
        count = self.parts or self.size // len(whole)
        for task in whole if count > 1 else ():
            self.queue.remove(task)
            self.queue.extend(Task(task.run, part) for part in Part(0, count).all())
            self._shares[task.run.run_id] = count
            self._begun.add(task.run.run_id)
            self._watch.begun(task.run)
            self._say(f"{title(task.run)}: answered by Ray workers, in {count} shares")

    # ---- what came back
    def _take(self, reference: Any) -> None:
        member, exceptions = self.busy.pop(reference), self.ray.exceptions
        task, member.task = member.task, None
        try:
            answer = self.ray.get(reference)
        except exceptions.RayTaskError as error:
            if isinstance(error.cause, (ConfigError, StoppedError)):
                raise error.cause from None
            raise StoppedError(f"A Ray worker can't go on: {type(error.cause).__name__}: {error.cause}") from error
        except exceptions.LocalRayletDiedError as error:
            raise StoppedError(f"Ray has ended on this machine ({_line(error)}); start it, then run the same command again.") from error
        except exceptions.RayError as error:
            self._lost(member, task, _line(error))
            return
        if task is None:
            self._welcome(member, answer)
        elif task.part is None:
            self._write(task.run, answer)
        else:
            self._shares[task.run.run_id] -= 1
            if not self._shares[task.run.run_id]:
                self.queue.appendleft(Task(task.run))  # its answers are all there: it is scored and recorded
        self.idle.append(member)

    def _welcome(self, member: Member, about: dict[str, Any]) -> None:
        """A worker has loaded the model."""
        if about["problems"]:
            raise ConfigError(about["problems"])
        self._check_checkpoint(about)
        member.host, member.sees_results, self._stillborn = about["host"], about["sees_results"], 0
        if not member.sees_results:
            if self.parts is not None and self.parts > 1:
                raise ConfigError(
                    f"--parts: got {self.parts}, but {member.host} does not see {self.work.store.root}, and the shares of a run need one "
                    "directory; leave --parts out, or choose an --output that every node sees."
                )
            self._say(f"{member.host} does not see {self.work.store.root}: its runs come back whole, and begin anew if it dies.")
        if not self._is_open:
            self._is_open = True
            self.work.begin()
            self.work.prepare(without_model(self.work.config, self.work.store), self.work.todo)

    def _check_checkpoint(self, about: dict[str, Any]) -> None:
        model = self.work.config.model
        if about["checkpoint"] != provenance.checkpoint_files(model.pretrained, model.revision):
            raise ConfigError(
                f"model.pretrained: the files of {model.pretrained} on {about['host']} are not those on this machine, by which records are "
                "told apart; put the same files on both, or give model.revision."
            )

    def _write(self, run: Run, files: dict[str, bytes] | None) -> None:
        """Put the files of a run that was made elsewhere where they belong."""
        if files is None:
            return
        folder = f"runs/{run.run_id}"
        if strange := [name for name in files if str(PurePosixPath(name).parent) not in (folder, images.FOLDER)]:
            raise StoppedError(f"A Ray worker sent {strange[0]!r}, expected files of {folder} only; is it of another version?")
        without_model(self.work.config, self.work.store).journal(run).delete()  # of an earlier attempt, by one who saw the directory
        self.work.store.forget(run.run_id)
        for name, content in files.items():
            write_atomic(self.work.store.root / name, content)

    # ---- deaths
    def _lost(self, member: Member, task: Task | None, how: str) -> None:
        """A worker died: its task goes to another one, unless it kills them all."""
        self.ray.kill(member.actor, no_restart=True)  # Ray may only have lost sight of it
        if task is None:
            self._lost_at_start(how)
            return
        self._deaths[task.name] += 1
        if task.part is None and self.work.is_made(task.run):  # it died after its work
            if self.work.store.is_finished(task.run.run_id):
                without_model(self.work.config, self.work.store).journal(task.run).delete()
        elif self._deaths[task.name] >= MOST_DEATHS:
            self._give_up(task, f"{MOST_DEATHS} Ray workers died while they made this run; the last one, on {member.host}, so: {how}")
        else:
            self._say(f"{task.name}: the worker on {member.host} died ({how}); another one takes over when its claim is void.")
            self.queue.appendleft(task)
        self._hire()

    def _lost_at_start(self, how: str) -> None:
        self._stillborn += 1
        if self._stillborn < MOST_DEATHS:
            self._hire()
        elif not self._team():
            raise StoppedError(f"{MOST_DEATHS} Ray workers died before they had loaded the model; the last one so: {how}")
        else:
            self._say(f"{MOST_DEATHS} Ray workers died before they had loaded the model ({how}); no more are started in their place.")

    def _give_up(self, task: Task, problem: str) -> None:
        """Record a run as failed; shares of it that others still answer lead to nothing."""
        run_id = task.run.run_id
        self.queue = deque(other for other in self.queue if other.run.run_id != run_id)
        if self._shares.get(run_id, 0) >= 0:
            record_lost(self.work.config, self.work.store, task.run, problem)
            self._shares[run_id] = -1

    # ---- words
    def _say(self, line: str) -> None:
        self.work.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _say_if_none_starts(self) -> None:
        """Once, as nothing else would be seen of a cluster without a free place."""
        if self._team():
            self._waiting_since = time.monotonic()
        elif time.monotonic() - self._waiting_since > _LONG_S:
            self._waiting_since = float("inf")
            self._say("No worker has started for a minute; `ray status` shows whether the cluster has a free place for one.")

    def _part(self) -> None:
        """Let the workers tidy up."""
        last = [member.actor.leave.remote() for member in self.idle]
        if last:
            self.ray.wait(last, num_returns=len(last), timeout=_LEAVE_S)


def _line(error: BaseException) -> str:
    """What Ray says of a death, which are many lines, in one."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]} ..."
