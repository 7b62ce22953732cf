"""A loaded model that makes runs: each is answered into its journal, evaluated, and recorded."""

from __future__ import annotations

import functools
import hashlib
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from vlm_pruner_eval.durable import stopped
from vlm_pruner_eval.errors import DamagedError, PruningError, StoppedError
from vlm_pruner_eval.lmms.journal import Journal, Source
from vlm_pruner_eval.lmms.plan import WHOLE, BatchSize, Part, ShareDone
from vlm_pruner_eval.redact import of_error, without_secrets
from vlm_pruner_eval.sweep import documents, provenance, records
from vlm_pruner_eval.sweep.config import SweepConfig
from vlm_pruner_eval.sweep.evaluate import Evaluated, answer_only, evaluate, samples_of
from vlm_pruner_eval.sweep.files import write_atomic
from vlm_pruner_eval.sweep.grid import UNPRUNED, Run
from vlm_pruner_eval.sweep.store import FAILED, FINISHED, Store, to_json


class Team(Protocol):
    """Processes that answer every run together, each its part; see `executors.ranks`."""

    def agree(self, name: str, value: Any) -> Any:
        """What the first part says, in plain types; the others' `value` does not count."""

    def give_up(self, run_id: str, sentence: str) -> None:
        """Say that this part will not answer its share of a run."""

    def check(self, run_id: str) -> None:
        """Raise a PruningError if another part gave a run up."""

    def meet(self, name: str) -> None:
        """Wait until all parts are here."""


@dataclass(frozen=True)
class _NoModel:
    """In place of the model of a run that no process of this machine has loaded one for."""

    working_size: BatchSize

    def describe(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Session:
    """What all runs of a sweep have in common.

    Attributes
    ----------
    model
        Loaded, see `lmms.answering.Answering`.
    checkpoint
        Identity of its files, see `provenance.checkpoint_files`.
    part
        The share of every run that this process answers; the first part also records.
    sources
        Of runs whose answers are computed together, by run id, see `lmms.shared`.
    team
        The processes of the other parts.
    made_by
        Goes into the provenance of every run, in place of what this process would say of itself.
    is_one_of_many
        True if the session is to make several runs.
    finished
        Runs that this session has made: as long as there are none, a failure may be one that every run would meet.
    """

    config: SweepConfig
    store: Store
    model: Any
    task_manager: Any
    checkpoint: Mapping[str, Any]
    part: Part = WHOLE
    sources: Mapping[str, Source] | None = None
    team: Team | None = None
    made_by: Mapping[str, Any] = field(default_factory=dict)
    is_one_of_many: bool = False
    finished: list[str] = field(default_factory=list)

    def journal(self, run: Run) -> Journal:
        """Where a run's answers are written as they come."""
        digest = hashlib.sha256(to_json(dict(self.checkpoint)).encode()).hexdigest()[:16]
        watch = None if self.team is None else functools.partial(self.team.check, run.run_id)
        return Journal(self.store.run_dir(run.run_id), {"run_id": run.run_id, "checkpoint": digest}, self.part, watch=watch)

    def answer_share(self, run: Run, part: Part) -> str | None:
        """Answer one share of a run into its journal, without waiting for others; who makes the run afterwards finds it there.

        Returns what went wrong; it is not recorded, as it will be met again. A batch that is too large for the memory is left, too.
        """
        may_shrink, self.model.may_shrink = self.model.may_shrink, False
        try:
            with replace(self, part=part).journal(run) as journal:
                journal.waits = False
                self._prepare(run, journal)
                evaluate(self.model, self.config, self.task_manager, self.store.run_dir(run.run_id))
        except ShareDone:
            return None
        except (StoppedError, DamagedError):
            raise
        except (Exception, SystemExit) as error:  # as in `_record`
            if full := stopped(error):
                raise full from error
            return of_error(error)
        finally:
            self.model.source, self.model.may_shrink = None, may_shrink
        return None

    def begin_again(self, run: Run) -> None:
        """Before a failed run is tried again: with samples that failed it begins anew, else the answers that are there are used.

        Its record stays until there is another one, so a process that is killed meanwhile leaves a failed run, to be tried again.
        """
        journal = self.journal(run)
        if journal.has_failures():
            journal.delete()

    def run(self, run: Run) -> str | None:
        """Answer what is left of a run, and record it; returns what went wrong, in a sentence, or None.

        Raises
        ------
        StoppedError
            The disk is full, another process has taken this one's place, or the first run met what every run would meet.
        DamagedError
            The run's journal was changed or damaged.
        """
        try:
            with self.journal(run) as journal:
                return self._record(run, journal, time.time())
        except OSError as error:
            if full := stopped(error):
                raise full from error
            raise

    def _record(self, run: Run, journal: Journal, started: float) -> str | None:
        self._prepare(run, journal)
        evaluated, problem, trace, raised = Evaluated(), None, None, None
        try:
            evaluate_part = answer_only if self.part.index else evaluate
            evaluated = evaluate_part(self.model, self.config, self.task_manager, self.store.run_dir(run.run_id))
        except (StoppedError, DamagedError):  # the journal may be that of another run, which is answered together with this one
            raise
        except (Exception, SystemExit) as error:  # whatever a task or a model raises costs one run, not the sweep: it is recorded below
            if full := stopped(error):
                raise full from error
            raised, trace = error, without_secrets(traceback.format_exc())
            problem = of_error(error)
            if self.team is not None:
                self.team.give_up(run.run_id, problem)
        finally:
            self.model.source = None
        if self.team is not None:
            self.team.meet(run.run_id)  # the journals are read by all parts, and are removed below
        if self.part.index:
            return problem
        samples = samples_of(self.model.answers, evaluated)
        common = common_cause(run, samples, raised)
        problem = _problem(samples, evaluated, problem)
        if common is not None and self.is_one_of_many and not self.finished:
            raise self._stopped(run, journal, common, problem, trace)
        unscored = evaluated.unscored if problem is None else {}
        if unscored:
            problem, trace = " ".join(unscored), "\n".join(unscored.values())
        total_s, answers_s = journal.earlier_s + time.time() - started, journal.earlier_s + journal.computed_s
        record = self._describe(run, samples, evaluated, total_s, answers_s, started)
        record |= {"status": FINISHED if problem is None else FAILED, "problem": problem, "traceback": trace}
        record |= {"unscored": list(unscored)} if unscored else {}  # its other scores are shown
        draws = {task: result.draws for task, result in evaluated.benchmarks.items() if result.draws is not None}
        self.store.write_run(record, samples, draws)
        if problem is None or record["failures"]:
            journal.delete()  # of a run that failed after all was answered, the answers are used again
        if problem is None:
            self.finished.append(run.run_id)
        return problem

    def _stopped(self, run: Run, journal: Journal, common: str, problem: str, trace: str | None) -> StoppedError:
        """The error that ends the sweep; nothing is recorded, so that the same command begins with this run.

        Its answers stay, and those of the runs that are answered together with it, but for journals with samples that failed.
        """
        journal.close()
        for run_id in {run.run_id, *(self.sources or ())}:
            of_run = Journal(self.store.run_dir(run_id), {})
            if of_run.has_failures():
                of_run.delete()
        where = ""
        if trace is not None:
            write_atomic(self.store.stopped, trace)
            where = f" The traceback is in {self.store.stopped}."
        return StoppedError(
            f"{run.key} {common}, so every run would fail: {problem.rstrip('.')}.{where} The sweep stops here and no run is recorded as "
            "failed; mend the cause (`vlm-pruner-eval doctor` may name it) and give the same command again."
        )

    def _prepare(self, run: Run, journal: Journal) -> None:
        self.model.configure(method=run.method, pruning_rate=run.pruning_rate, **run.params)
        self.model.resume_at(self._batch_size(run, journal))
        self.model.source = (self.sources or {}).get(run.run_id, journal)

    def _batch_size(self, run: Run, journal: Journal) -> BatchSize | None:
        size = journal.batch_size()
        if self.team is None:
            return size
        agreed = self.team.agree(f"batch size of {run.run_id}", None if size is None else size.as_json())
        return None if agreed is None else BatchSize.of(agreed)

    def _describe(
        self,
        run: Run,
        samples: list[dict[str, Any]],
        evaluated: Evaluated,
        total_s: float,
        answers_s: float = 0.0,
        started: float | None = None,
    ) -> dict[str, Any]:
        described, is_shared = self.model.describe(), records.is_untimed(samples)
        times = records.summarise_times(samples) | {"total_s": total_s, "answers_s": answers_s}
        memory = records.summarise_memory(samples, described)
        return {
            "run_id": run.run_id,
            **run.line(),
            "config": run.config,
            "tasks": {task: result.record for task, result in evaluated.benchmarks.items()},
            "documents": documents.fingerprints(evaluated.logged),
            "tokens": records.summarise_tokens(samples),
            "times": records.without_times(times) if is_shared else times,
            "memory": memory | {"peak_bytes": None} if is_shared else memory,
            "shared_prefix": is_shared,
            "parts": self.part.count,
            **self.model.working_size.as_json(),
            "kept_digest": records.run_digest(samples),
            "n_answers": len(samples),
            "failures": records.failures(samples)[:50],
            "provenance": provenance.collect(described, self.checkpoint, started) | self.made_by,
        }


def without_model(config: SweepConfig, store: Store) -> Session:
    """A session of a process that sees to what others make: it has their journals, and answers nothing."""
    files = provenance.checkpoint_files(config.model.pretrained, config.model.revision)
    return Session(config, store, _NoModel(BatchSize(config.model.batch_size)), None, files)


def record_lost(config: SweepConfig, store: Store, run: Run, problem: str) -> None:
    """Record a run as failed for a process that could not do it itself, as it died. What it answered stays in the journal."""
    record = without_model(config, store)._describe(run, [], Evaluated(), 0.0) | {"status": FAILED, "problem": problem, "traceback": None}
    store.write_run(record, [])


def common_cause(run: Run, samples: Sequence[Mapping[str, Any]], raised: BaseException | None) -> str | None:
    """Return words for a failure that does not depend on the method of a run; None for another one, or none."""
    if isinstance(raised, ImportError):
        return "met a package that can't be imported"
    if raised is not None and not samples and not isinstance(raised, PruningError):  # for lack of memory, say
        return "failed before its first answer"
    if run.method == UNPRUNED and samples and len(records.failures(samples)) == len(samples):
        return "is the unpruned model, and all of its samples failed"
    return None


def _problem(samples: list[dict[str, Any]], evaluated: Evaluated, raised: str | None) -> str | None:
    """Why a run does not count: failed samples before what was raised, as the one often follows from the other."""
    failed = records.failures(samples)
    if failed:
        first = failed[0]
        return f"{len(failed)} of {len(samples)} samples failed (first: {first['task']}, document {first['doc_id']}: {first['error']})"
    return raised or " ".join(records.missing_answers(samples, evaluated.logged)) or None
