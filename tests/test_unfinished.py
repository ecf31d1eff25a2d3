"""A command that was killed continues: to the bits of one that was not, and without computing again what it had."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import nn

import pow2quant
from pow2quant import config as configuration
from pow2quant.backends.base import SILENT
from pow2quant.config import RunConfig
from pow2quant.errors import ConfigError, OutputError
from pow2quant.progress import Within
from pow2quant.runs import Job, unfinished
from pow2quant.runs.job import Given
from pow2quant.study import compare, sweep
from pow2quant.study.search import search
from tests.attacks import good

T = TypeVar("T")
FILES = ("model.onnx", "model_float.onnx", "model.encodings", "model.safetensors", "config.yaml")


class Killed(BaseException):
    """Stands for what ends a process."""


def end() -> None:
    raise Killed


def kill() -> None:
    """Ends this process."""
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class Watching:
    """Progress that ends the run at the n-th step of what has this title, and remembers what was said."""

    title: str = ""
    step: int = 0
    end: Callable[[], None] = end
    said: list[str] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)

    def track(self, items: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
        for number, item in enumerate(items):
            if title == self.title and number == self.step:
                self.end()
            self.steps.append(title)
            yield item

    def note(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is kept, however little time it took."""
    monkeypatch.setattr(unfinished, "PAUSE", 0)
    monkeypatch.setattr(unfinished, "SHARE", 0)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 4)
    )


def images(seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(24, 1, 8, 8, generator=generator), torch.arange(24) % 4


def quantized(output: Path, method: str, progress: Watching, seed: int = 0) -> dict[str, bytes]:
    own = {"report": {"statistics": False, "latency": False}, "data": {"batch_size": 8}}
    methods = [{method: {"iterations": 20, "batch_size": 4}}]
    pow2quant.quantize(network(), images(seed), "w4a8", methods, config=own, output=output, progress=progress)
    return {name: (output / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What AdaRound leaves that nothing interrupts."""
    return quantized(tmp_path_factory.mktemp("whole") / "run", "adaround", Watching())


def killed(output: Path, method: str, seed: int = 0) -> None:
    """A run that ends behind two of a method's four parts."""
    with pytest.raises(Killed):
        quantized(output, method, Watching(method, 2), seed)
    assert not output.exists()


def test_adaround_continues_behind_its_last_part(whole: dict[str, bytes], tmp_path: Path) -> None:
    killed(tmp_path / "run", "adaround")
    rest = Watching()
    assert quantized(tmp_path / "run", "adaround", rest) == whole
    assert rest.steps.count("adaround") == 2
    assert any("continued" in text for text in rest.said)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_qdrop_continues_behind_its_last_block(tmp_path: Path) -> None:
    expected = quantized(tmp_path / "whole", "qdrop", Watching())
    killed(tmp_path / "run", "qdrop")
    rest = Watching()
    assert quantized(tmp_path / "run", "qdrop", rest) == expected
    assert rest.steps.count("qdrop") == 2


def test_a_run_on_other_images_does_not_continue_it(whole: dict[str, bytes], tmp_path: Path) -> None:
    killed(tmp_path / "run", "adaround", seed=1)
    rest = Watching()
    assert quantized(tmp_path / "run", "adaround", rest) == whole
    assert rest.steps.count("adaround") == 4
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_another_network_with_the_same_weights_is_another_job() -> None:
    class Net(nn.Sequential):
        def __init__(self, activation: nn.Module) -> None:
            super().__init__(nn.Linear(4, 4, bias=False), activation)
            nn.init.eye_(self[0].weight)

    x = torch.ones(8, 4)
    jobs = [Job.start(RunConfig(), SILENT, Given(Net(act).eval(), [x])) for act in (nn.ReLU(), nn.ReLU(), nn.Tanh())]
    for name in ("fingerprint", "identity"):
        first, same, other = (getattr(job, name)() for job in jobs)
        assert first == same != other


@pytest.mark.parametrize("damage", [b"", b"text", (8).to_bytes(8, "little") + b"{}      "])
def test_what_is_damaged_is_not_known(damage: bytes, tmp_path: Path) -> None:
    for name in ("it.safetensors", "numbers.json"):
        (tmp_path / name).write_bytes(damage)
    kept = unfinished.Unfinished(tmp_path)
    sim = pow2quant.simulate(network(), torch.rand(1, 1, 8, 8)).simulation
    assert not kept.simulation("it", lambda: "", lambda sim: {}).restore(sim)
    assert kept.numbers(lambda: "").get("one", lambda: 1.5) == 1.5


SEARCH = {
    "data": {"batch_size": 150},
    "ptq": {"calibration_batches": 1, "max_eval_batches": 1},
    "report": {"statistics": False, "latency": False},
    "search": {"constraints": ["accuracy_drop=5%"], "candidates": ["3", "8"], "sensitivity_batches": 1, "points": 2},
}


def test_a_search_continues_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted three times: among the candidates, the sensitivities, and the plans."""
    scores: list[str] = []
    score = Job.score
    monkeypatch.setattr(Job, "score", lambda job, *model: (scores.append("one"), score(job, *model))[1])
    config = configuration.from_mapping(SEARCH)

    def run(output: str, progress: Watching) -> dict[str, bytes]:
        search(config, tmp_path / output, progress=progress)
        names = (*FILES, "plan.yaml", "best.yaml", "search.json", "sensitivity.csv", "pareto.csv")
        return {name: (tmp_path / output / name).read_bytes() for name in names}

    expected, count = run("whole", Watching()), len(scores)
    scores.clear()
    for title, step in (("quantizing with every candidate", 1), ("sensitivity (kl)", 3), ("verifying plans", 1)):
        with pytest.raises(Killed):
            run("run", Watching(title, step))
    assert run("run", Watching()) == expected
    assert len(scores) == count, "what was measured is not measured again"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "whole"]


TIMES = {"duration_seconds", "attempts", "run"}


def studied(method: str, runs: str | None, output: Path, progress: Watching) -> tuple[list[Any], list[bytes]]:
    """What comes of two trials, without what says how long, how often and where; and the models of whole runs."""
    base = configuration.load("quick.yaml")
    study = compare.study(base, (), ["4:8"], [method], "0,1", runs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Within, "track", lambda _, *items: progress.track(*items))
        for key in ("PAUSE", "SHARE"):
            patch.setattr(unfinished, key, 0)
        *_, rows = sweep.tried(study, output)
    return (
        [{key: value for key, value in row.items() if key not in TIMES} for row in rows],
        [path.read_bytes() for name in FILES for path in sorted(output.glob(f"runs/*/{name}"))],
    )


@pytest.mark.parametrize(
    ("method", "runs", "killed", "spared"),
    [
        ("adaround:iterations=20", None, ("adaround", 1), "adaround"),
        ("none", "qat", ("epoch 2 of 2", 0), "epoch 1 of 2"),
    ],
)
def test_another_process_continues_a_trial_whose_own_was_killed(
    method: str, runs: str | None, killed: tuple[str, int], spared: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good.put(tmp_path, training__epochs=2)
    monkeypatch.chdir(tmp_path)
    whole, rest = Watching(), Watching()
    expected = studied(method, runs, tmp_path / "whole", whole)
    doomed = get_context("spawn").Process(
        target=studied, args=(method, runs, tmp_path / "study", Watching(*killed, kill))
    )
    doomed.start()
    doomed.join()
    assert doomed.exitcode == -signal.SIGKILL
    assert studied(method, runs, tmp_path / "study", rest) == expected
    assert 0 < rest.steps.count(spared) < whole.steps.count(spared)
    assert not [*tmp_path.rglob("*.unfinished"), *tmp_path.rglob("*.training")]


def test_files_of_the_users_own_stay(tmp_path: Path) -> None:
    folder = tmp_path / "run.unfinished"
    folder.mkdir()
    (folder / "mine.txt").touch()
    with unfinished.beside(tmp_path / "run") as kept:
        kept.numbers(lambda: "").get("one", lambda: 1.5)
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(("error", "stays"), [(ConfigError, False), (OutputError, True), (Killed, True)])
def test_what_would_come_again_leaves_nothing(error: type[BaseException], stays: bool, tmp_path: Path) -> None:
    """A full disk may be another time; a configuration that cannot be will not."""
    with pytest.raises(error), unfinished.beside(tmp_path / "run") as kept:  # noqa: PT012
        kept.numbers(lambda: "").get("one", lambda: 1.5)
        raise error("it")
    assert (tmp_path / "run.unfinished").exists() == stays
