"""Which trials there are, who runs them, and what came of them: an Optuna study that any number of workers share.

Optuna's trials are the only record. A worker that changes it holds the study's lock. Every worker also holds a lock of
its own as long as it lives. So a trial whose worker's lock is free has no worker, and the next one takes it over: none
is lost, and none is finished twice.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar
from uuid import uuid4

from pow2quant.errors import ConfigError, MissingExtraError, OutputError, Pow2QuantError
from pow2quant.study.locks import PATIENCE, AdvisoryLock, FileLock, Lock, LockLostError, Locks, held, is_away
from pow2quant.study.space import Combination, Grid, Label, Range, combinations

P = ParamSpec("P")
T = TypeVar("T")

MOMENT = 1.0
"""Seconds between two tries of a database that is away, and for which another may look at a worker's lock."""

SAMPLERS = ("tpe", "random")
ATTEMPTS = 3
"""So many workers may die of one trial before it counts as failed."""


@dataclass(frozen=True)
class Plan:
    """What a study tries: every combination of its grids, or so many `trials` that a sampler draws from one."""

    grids: tuple[Grid, ...]
    trials: int | None = None
    sampler: str = "tpe"
    seed: int = 0

    def __len__(self) -> int:
        return self.trials or sum(1 for grid in self.grids for _ in combinations(grid))


class Claim(NamedTuple):
    """A trial that a worker has taken: its number, which grid it belongs to, and its labels."""

    number: int
    grid: int
    combination: Combination


class Entry(NamedTuple):
    """A trial as it stands in the record. state: running, complete or failed. result: by column; attempts: workers."""

    number: int
    state: str
    grid: int
    combination: Combination
    result: dict[str, Any]
    error: str
    attempts: int


def _patient(act: Callable[P, T]) -> Callable[P, T]:
    """Does it again where the database is away, for at most `PATIENCE` seconds. What is recorded is not done twice."""

    @wraps(act)
    def tried(*arguments: P.args, **options: P.kwargs) -> T:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                return act(*arguments, **options)
            except Exception as error:
                if not is_away(error) or time.monotonic() > end:
                    raise
                time.sleep(MOMENT)

    return tried


@dataclass
class Ledger:
    """The record of one study.

    url: of its database, `sqlite:///FILE` or `postgresql://…`; name: of the study in it. fingerprint: what the study
    is; a study of this name that is another is not continued. worker: a name that no other worker has. taken: its
    trials, as far as it knows.
    Raises OutputError for a database that cannot be used, ConfigError for a study that is another.
    """

    url: str
    name: str
    plan: Plan
    fingerprint: str
    worker: str = field(default_factory=lambda: uuid4().hex)
    taken: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        optuna = _optuna()
        self._locks = locks(self.url, self.name)
        self._record = self._locks("record")
        self._alive: Lock | None = None
        with _no_folder_beside_what_is_refused(self.url):
            self._open(optuna)

    def _open(self, optuna: Any) -> None:
        try:
            with self._locked():
                self._study = optuna.create_study(
                    storage=optuna.storages.RDBStorage(_dialect(self.url), engine_kwargs=self._engine()),
                    study_name=self.name,
                    direction="maximize",
                    load_if_exists=True,
                )
                known = self._study.user_attrs.get("fingerprint")
                if known is None:
                    self._study.set_user_attr("fingerprint", self.fingerprint)
        except OutputError:
            raise
        except Exception as error:  # whatever the database's driver raises
            raise OutputError(f"{_shown(self.url)}: cannot be used: {' '.join(str(error).split())[:200]}") from error
        if known not in (None, self.fingerprint):
            raise ConfigError(f"{self.name}: is another study already; choose another --study or another --output")

    @_patient
    def claim(self) -> Claim | None:
        """The next trial for this worker: one whose worker has died, or a new one; None when there is none left."""
        if self._alive is None or not self._alive.is_held():
            self._alive = self._locks(f"worker {self.worker}")
            if not self._alive.take(MOMENT):
                raise OutputError(f"worker {self.worker}: is running already")
        with self._locked():
            trials = self._study.get_trials(deepcopy=False)
            return self._orphan(trials) or (self._drawn(trials) if self.plan.trials else self._next(trials))

    @_patient
    def finish(self, claim: Claim, result: Mapping[str, Any], value: float | None, error: str = "") -> bool:
        """Records what came of a trial; not, and False, where it is no longer this worker's."""
        from optuna.trial import TrialState

        with self._locked():
            trial = self._study.get_trials(deepcopy=False)[claim.number]
            if trial.state != TrialState.RUNNING or trial.user_attrs.get("worker") != self.worker:
                return False
            handle = self._handle(trial)
            handle.set_user_attr("result", dict(result))
            handle.set_user_attr("error", error)
            failed = bool(error) or value is None
            state = TrialState.FAIL if failed else TrialState.COMPLETE
            self._study.tell(claim.number, None if failed else value, state=state)
        return True

    @_patient
    def give_back(self, claim: Claim) -> None:
        """Leaves a trial to the next worker, as if this worker had not begun it."""
        with self._locked():
            trial = self._study.get_trials(deepcopy=False)[claim.number]
            self.taken.discard(claim.number)
            if not trial.state.is_finished() and trial.user_attrs.get("worker") == self.worker:
                handle = self._handle(trial)
                handle.set_user_attr("worker", None)
                handle.set_user_attr("attempts", trial.user_attrs["attempts"] - 1)

    @_patient
    def entries(self) -> list[Entry]:
        """Every trial that there is, in order."""
        with self._locked():
            trials = self._study.get_trials(deepcopy=False)
        states = {"COMPLETE": "complete", "FAIL": "failed"}
        return [
            Entry(
                t.number,
                states.get(t.state.name, "running"),
                t.user_attrs.get("grid", 0),
                dict(t.params),
                t.user_attrs.get("result", {}),
                t.user_attrs.get("error", ""),
                t.user_attrs.get("attempts", 0),
            )
            for t in trials
        ]

    def close(self) -> None:
        """This worker is gone: what it has not finished is free."""
        if self._alive is not None:
            self._alive.drop()
            self._alive = None

    def _locked(self) -> AbstractContextManager[None]:
        return held(self._record)

    def _engine(self) -> dict[str, Any]:
        """A connection for each transaction: between them a worker computes for minutes."""
        from sqlalchemy.pool import NullPool

        return {
            "poolclass": NullPool,
            "pool_events": [(self._require_the_lock, "connect")],
            "connect_args": {"timeout": 60} if self.url.startswith("sqlite") else {},
        }

    def _require_the_lock(self, *_: object) -> None:
        """A server that has started again gives out connections, but the lock of before is gone."""
        if not self._record.is_held():
            raise LockLostError("the study's lock was lost with its connection")

    def _handle(self, trial: Any) -> Any:
        """What changes a trial that is running."""
        return _optuna().trial.Trial(self._study, trial._trial_id)

    def _orphan(self, trials: Sequence[Any]) -> Claim | None:
        """A running trial whose worker is dead. One that has killed too many is told to have failed."""
        for trial in trials:
            worker, attempts = trial.user_attrs.get("worker"), trial.user_attrs.get("attempts", 0)
            if trial.state.is_finished() or (trial.number in self.taken and worker == self.worker):
                continue
            if worker != self.worker and not self._is_dead(worker):
                continue
            handle = self._handle(trial)
            if worker == self.worker:  # the connection was lost before this worker knew that it had it
                return self._taken(handle, trial.user_attrs.get("grid", 0), attempts)
            if attempts < ATTEMPTS:
                return self._taken(handle, trial.user_attrs.get("grid", 0), attempts + 1)
            handle.set_user_attr("error", f"its worker died {attempts} times")
            self._study.tell(trial.number, state=_optuna().trial.TrialState.FAIL)
        return None

    def _is_dead(self, worker: str | None) -> bool:
        if worker is None:  # killed while it held the record's lock, which is ours now
            return True
        if worker == self.worker:
            return False
        lock = self._locks(f"worker {worker}")
        if not lock.take():
            return False
        lock.drop()
        return True

    def _taken(self, handle: Any, grid: int, attempts: int) -> Claim:
        """The trial is this worker's; what it lacks of its parameters is drawn."""
        combination = {a.name: _suggested(handle, a.name, a.labels) for a in self.plan.grids[grid]}
        handle.set_user_attr("grid", grid)
        handle.set_user_attr("attempts", attempts)
        handle.set_user_attr("worker", self.worker)
        self.taken.add(handle.number)
        return Claim(handle.number, grid, combination)

    def _next(self, trials: Sequence[Any]) -> Claim | None:
        """The first combination that has no trial; the trial is written whole, as this worker's."""
        optuna = _optuna()
        known = {_key(t.user_attrs.get("grid", 0), t.params) for t in trials}
        for index, grid in enumerate(self.plan.grids):
            for combination in combinations(grid):
                if _key(index, combination) in known:
                    continue
                distributions = {
                    a.name: optuna.distributions.CategoricalDistribution(self._labels(a.name)) for a in grid
                }
                self._study.add_trial(
                    optuna.trial.create_trial(
                        state=optuna.trial.TrialState.RUNNING,
                        params=combination,
                        distributions=distributions,
                        user_attrs={"grid": index, "attempts": 1, "worker": self.worker},
                    )
                )
                self.taken.add(len(trials))
                return Claim(len(trials), index, combination)
        return None

    def _labels(self, name: str) -> tuple[Label, ...]:
        """The labels of an axis in all grids: Optuna wants one set for each name."""
        found = (label for grid in self.plan.grids for a in grid if a.name == name for label in a.points)
        return tuple({json.dumps(label): label for label in found}.values())

    def _drawn(self, trials: Sequence[Any]) -> Claim | None:
        """A new trial from the sampler, which knows those before."""
        optuna = _optuna()
        assert self.plan.trials is not None
        if len(trials) >= self.plan.trials:
            return None
        kinds = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
        self._study.sampler = kinds[self.plan.sampler](seed=self.plan.seed + len(trials))
        return self._taken(self._study.ask(), 0, 1)


def _suggested(handle: Any, name: str, labels: tuple[Label, ...] | Range) -> Label:
    """The value of a trial's parameter: what it has, or what the sampler draws."""
    if name in handle.params:
        return _label(handle.params[name])
    if not isinstance(labels, Range):
        return _label(handle.suggest_categorical(name, labels))
    if labels.integer:
        return int(handle.suggest_int(name, int(labels.low), int(labels.high)))
    return _label(handle.suggest_float(name, labels.low, labels.high, step=labels.step, log=labels.log))


def _label(value: Any) -> Label:
    """1.1500000000000001, from a low end and a step, is 1.15."""
    made: Label = float(f"{value:.12g}") if type(value) is float else value
    return made


def _key(grid: int, combination: Mapping[str, Label]) -> str:
    return json.dumps([grid, combination], sort_keys=True)


def locks(url: str, study: str) -> Locks:
    """The locks that belong to a database. Raises ConfigError for one that is neither SQLite nor PostgreSQL."""
    if url.startswith("sqlite:///"):
        folder = _folder(url)
        return lambda name: FileLock(folder / f"{study} {name}".replace(" ", "-"))
    if re.match(r"postgres(ql)?(\+\w+)?://", url):
        plain = re.sub(r"^postgres(ql)?(\+\w+)?://", "postgresql://", url)
        return lambda name: AdvisoryLock(plain, f"pow2quant {study} {name}")
    raise ConfigError(f"--storage {_shown(url)}: legal: sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE")


def _folder(url: str) -> Path:
    return Path(f"{url.removeprefix('sqlite:///')}.locks")


@contextmanager
def _no_folder_beside_what_is_refused(url: str) -> Iterator[None]:
    """Takes the folder of locks away again where it was made for a database that cannot be used."""
    made = url.startswith("sqlite:///") and not _folder(url).exists()
    try:
        yield
    except Pow2QuantError:
        if made:
            shutil.rmtree(_folder(url), ignore_errors=True)
        raise


def _dialect(url: str) -> str:
    """The URL for SQLAlchemy, with the driver that is installed."""
    return re.sub(r"^postgres(ql)?(\+\w+)?://", "postgresql+psycopg://", url)


def _shown(url: str) -> str:
    """The URL without its password."""
    return re.sub(r"(://[^:/@]+):[^@]*@", r"\1:…@", url)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise MissingExtraError("studies need Optuna: pip install 'pow2quant[search]'") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna
