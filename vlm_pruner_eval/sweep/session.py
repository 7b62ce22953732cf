"""A loaded model that makes units: each is answered into its log, scored, and recorded."""

from __future__ import annotations

import hashlib
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vlm_pruner_eval.durable import stopped
from vlm_pruner_eval.errors import DamagedError, PruningError, StoppedError
from vlm_pruner_eval.lmms.run_context import RunContext
from vlm_pruner_eval.redact import of_error, without_secrets
from vlm_pruner_eval.store.answers import Answer, AnswerLog
from vlm_pruner_eval.store.files import write_atomic
from vlm_pruner_eval.store.folder import Store
from vlm_pruner_eval.store.schema import FAILED, FINISHED, UnitRecord, plain, to_json
from vlm_pruner_eval.store.summaries import TaskScore
from vlm_pruner_eval.sweep import documents, provenance, records
from vlm_pruner_eval.sweep.config import SweepConfig
from vlm_pruner_eval.sweep.evaluate import Evaluated, evaluate
from vlm_pruner_eval.sweep.grid import UNPRUNED
from vlm_pruner_eval.sweep.read_once import Held
from vlm_pruner_eval.sweep.units import WorkUnit


@dataclass(frozen=True)
class Session:
    """What all units of a sweep have in common.

    Attributes
    ----------
    model
        Loaded, see `lmms.answering.Answering`.
    checkpoint
        Identity of its files, see `provenance.checkpoint_files`.
    context
        Who is told of answers.
    sources
        Of runs whose answers are computed together, by run id, see `lmms.shared_runs`.
    command
        What was typed, for the records; None: as this process was started.
    is_one_of_many
        True if the session is to make several units.
    finished
        Units that this session has made: as long as there are none, a failure may be one that every run would meet.
    data_sets
        By entry of the sweep file, those that its tasks have read, see `read_once`.
    """

    config: SweepConfig
    store: Store
    model: Any
    task_manager: Any
    checkpoint: Mapping[str, Any]
    context: RunContext
    sources: Mapping[str, Any] | None = None
    command: str | None = None
    is_one_of_many: bool = False
    finished: list[str] = field(default_factory=list)
    data_sets: dict[str, Held] = field(default_factory=dict)

    def log(self, unit: WorkUnit) -> AnswerLog:
        """The log of a unit's answers."""
        digest = hashlib.sha256(to_json(dict(self.checkpoint)).encode()).hexdigest()[:16]
        return AnswerLog(unit.stored(self.store).folder, {"unit": unit.path, "checkpoint": digest}, self.config.limit)

    def make(self, unit: WorkUnit) -> UnitRecord:
        """Answer what is left of a unit, score it, and record it.

        Raises
        ------
        StoppedError
            The disk is full, or the first unit met what every run would meet.
        DamagedError
            The log was changed or damaged.
        """
        started = time.time()
        try:
            with self.log(unit) as log:
                self.store.write_head(unit.run.head)
                return self._make(unit, log, started)
        except OSError as error:
            if full := stopped(error):
                raise full from error
            raise

    def _make(self, unit: WorkUnit, log: AnswerLog, started: float) -> UnitRecord:
        run = unit.run
        self.model.configure(method=run.method, pruning_rate=run.pruning_rate, **run.params)
        self.model.resume_at(log.batch_size())
        self.model.context = replace(self.context, source=(self.sources or {}).get(run.run_id, log))
        evaluated, problem, trace, raised = Evaluated(), None, None, None
        try:
            evaluated = evaluate(
                self.model, self.config, unit.task, self.task_manager, log.folder, self.data_sets.setdefault(unit.task, {})
            )
        except (StoppedError, DamagedError):  # the log may be that of another unit, which is answered together with this one
            raise
        except (Exception, SystemExit) as error:  # whatever a task or a model raises costs one unit, not the sweep: it is recorded below
            if full := stopped(error):
                raise full from error
            raised = error
            trace = without_secrets(traceback.format_exc())
            problem = of_error(error)
        finally:
            self.model.context = replace(self.context, source=None)
        answers = sorted(self.model.answers, key=lambda answer: (answer.task, answer.doc_id, answer.choice or 0))
        problem = _problem(answers, evaluated, problem)
        common = common_cause(unit, answers, raised)
        if common is not None and self.is_one_of_many and not self.finished:
            raise self._stopped(unit, log, common, problem, trace)
        # of tasks that could not be scored, the answers and the other scores are shown
        unscored = dict(evaluated.unscored) if problem is None else {}
        if unscored:
            problem = " ".join(unscored)
            trace = "\n".join(unscored.values())
        seconds = (log.earlier_s + time.time() - started, log.earlier_s + log.computed_s)
        told = {"status": FINISHED if problem is None else FAILED, "problem": problem, "traceback": trace, "unscored": list(unscored)}
        record = self._record(unit, answers, evaluated, seconds, started, told)
        draws = {task: scored.draws for task, scored in evaluated.benchmarks.items() if scored.draws is not None}
        scores = records.document_scores(answers, evaluated.logged, evaluated.scored)
        unit.stored(self.store).write(record, scores, draws)
        if problem is None:
            self.finished.append(unit.path)
        return record

    def _record(
        self,
        unit: WorkUnit,
        answers: Sequence[Answer],
        evaluated: Evaluated,
        seconds: tuple[float, float],
        started: float,
        told: Mapping[str, Any],
    ) -> UnitRecord:
        described = self.model.describe()
        size = self.model.working_size
        return UnitRecord(
            **told,
            task=unit.task,
            limit=self.config.limit,
            scores={task: TaskScore.model_validate(plain(scored.record)) for task, scored in evaluated.benchmarks.items()},
            documents=documents.fingerprints(evaluated.logged),
            splits={answer.task: answer.split for answer in answers},
            tokens=records.summarise_tokens(answers),
            times=records.summarise_times(answers, *seconds),
            memory=records.summarise_memory(answers, described),
            shared_prefix=records.is_untimed(answers),
            batch_size=size.size,
            exhausted=list(size.exhausted),
            kept_digest=records.kept_digest(answers),
            adapted=described.get("adapted"),
            n_answers=len(answers),
            failures=records.failures(answers),
            provenance=provenance.collect(described, self.checkpoint, started, self.command),
        )

    def _stopped(self, unit: WorkUnit, log: AnswerLog, common: str, problem: str, trace: str | None) -> StoppedError:
        """The error that ends the sweep; nothing is recorded, so that the same command begins with this unit.

        Its answers stay, and those of the units that are answered together with it, but for logs with samples that failed.
        """
        log.close()
        for run_id in {unit.run.run_id, *(self.sources or ())}:
            of_run = AnswerLog(self.store.unit(run_id, unit.folder).folder, {})
            if of_run.has_failures():
                of_run.delete()
        where = ""
        if trace is not None:
            write_atomic(self.store.stopped, trace)
            where = f" The traceback is in {self.store.stopped}."
        return StoppedError(
            f"{unit.name} {common}, so every run would fail: {problem.rstrip('.')}.{where} The sweep stops here and no run is recorded as "
            "failed; mend the cause (`vlm-pruner-eval doctor` may name it) and give the same command again."
        )


def common_cause(unit: WorkUnit, answers: Sequence[Answer], raised: BaseException | None) -> str | None:
    """Return words for a failure that does not depend on the method of a run; None for another one, or none."""
    if isinstance(raised, ImportError):
        return "met a package that can't be imported"
    if raised is not None and not answers and not isinstance(raised, PruningError):  # for lack of memory, say
        return "failed before its first answer"
    if unit.run.method == UNPRUNED and answers and all(answer.error for answer in answers):
        return "is the unpruned model, and all of its samples failed"
    return None


def _problem(answers: Sequence[Answer], evaluated: Evaluated, raised: str | None) -> str | None:
    """Why a unit does not count: failed samples before what was raised, as the one often follows from the other."""
    failed = [answer for answer in answers if answer.error]
    if failed:
        first = failed[0]
        return f"{len(failed)} of {len(answers)} samples failed (first: {first.task}, document {first.doc_id}: {first.error})"
    return raised or " ".join(records.missing_answers(answers, evaluated.logged)) or None
