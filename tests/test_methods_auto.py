"""`auto`: which chain is chosen, within which budget, on which images; that the run is then that of the chain."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor, nn

import pow2quant
from pow2quant import config as configuration
from pow2quant.cli import main
from pow2quant.config import Choice
from pow2quant.errors import DataError
from pow2quant.methods.auto import (
    ALIGN,
    BIAS,
    EQUALIZE,
    NOISE,
    Auto,
    Chain,
    Facts,
    Trial,
    best,
    cheap,
    expected,
    learned,
    named,
)
from pow2quant.runs import choosing, unfinished
from pow2quant.runs.choosing import some, split

NARROW = Facts(4, 4, depthwise=False, default=(ALIGN, NOISE))


def trial(noise: list[float], chain: Chain = (), seconds: float = 1.0) -> Trial:
    return Trial(chain, np.array(noise), seconds)


def tries(noise: Callable[[Chain], list[float]], seconds: float = 1.0) -> Callable[[Chain, int], Trial]:
    return lambda chain, part: trial(noise(chain), chain, seconds)


# Which of two is the choice


def test_of_chains_that_the_same_images_judged_the_best_mean_wins() -> None:
    first, lucky = trial([1.0, 1.2, 0.8, 1.0]), trial([0.1, 2.2, 0.3, 1.3])
    assert not lucky.clearly_beats(first)
    assert best([first, lucky]) is lucky
    assert best([lucky, first]) is lucky
    assert best([first, trial([1.0, 1.2, 0.8, 1.0])]) is first


def test_what_fewer_images_judged_must_win_clearly_on_those() -> None:
    first = trial([1.0, 1.2, 0.8, 1.0, 0.1, 0.1])
    clear, lucky = trial([0.5, 0.6, 0.4, 0.5]), trial([0.1, 2.2, 0.3, 1.3])
    assert lucky.gain_over(first)[0] > 0
    assert best([first, lucky]) is first
    assert best([first, lucky, clear]) is clear


class Drawn:
    """Chains with errors of their own on four parts of 16 images; some images have large errors with any chain."""

    def __init__(self, seed: int) -> None:
        self.seed, self.calls = seed, 0
        self.images = np.random.default_rng(seed).pareto(2, 64) + 0.1

    def factor(self, chain: Chain) -> float:
        return float(np.random.default_rng([self.seed, *named(chain).encode()]).uniform(0.8, 2))

    def noise(self, chain: Chain) -> NDArray[np.float64]:
        jitter = np.random.default_rng([1, self.seed, *named(chain).encode()]).uniform(0.5, 1.5, 64)
        return self.factor(chain) * self.images * jitter

    def attempt(self, chain: Chain, part: int) -> Trial:
        self.calls += 1
        return Trial(chain, self.noise(chain)[16 * part : 16 * (part + 1)], 0.1)


@pytest.mark.parametrize("seed", range(8))
def test_the_choice_is_what_all_images_would_choose_for_fewer_trials(seed: int) -> None:
    drawn = Drawn(seed)
    trials = Auto().choose(NARROW, drawn.attempt, lambda line: None)
    choice = best(trials)
    assert max(t.parts for t in trials) == choice.parts > 1
    assert drawn.calls == sum(t.parts for t in trials) < 4 * len(trials)
    for t in trials:
        assert np.array_equal(t.noise, drawn.noise(t.chain)[: 16 * t.parts])
        assert not t.clearly_beats(choice)
        assert drawn.noise(t.chain).mean() > 0.9 * choice.noise.mean(), "what was given up early is no better"


def test_one_part_is_enough_where_one_chain_is_clearly_best() -> None:
    trials = Auto().choose(NARROW, tries(lambda c: [0.1, 0.1] if c == (BIAS,) else [1.0, 1.0]), lambda line: None)
    assert {t.parts for t in trials} == {1}
    assert best(trials).chain == (BIAS,)


def took(chain: Chain) -> float:
    """Seconds on a network where every method takes what `auto` expects."""
    return expected(chain, [trial([1.0], (BIAS,), 1.0)])


def alike(chain: Chain, part: int) -> Trial:
    """Two images, of which none tells chains apart."""
    return trial([0.9, 1.3] if chain == (ALIGN, BIAS) else [1.4, 1.0], chain, took(chain))


def test_the_budget_ends_further_parts_too_and_the_best_comes_first() -> None:
    lines: list[str] = []
    facts = Facts(16, 16, depthwise=False, default=(BIAS,))
    minutes = 1.5 * sum(map(took, cheap(facts))) / 60
    trials = Auto(minutes=minutes).choose(facts, alike, lines.append)
    assert sum(t.seconds for t in trials) <= minutes * 60
    assert best(trials).chain == (ALIGN, BIAS)
    assert best(trials).parts == max(t.parts for t in trials) > min(t.parts for t in trials)
    assert len(set(lines)) == len(lines)


def test_what_is_left_out_is_said_once() -> None:
    lines: list[str] = []
    trials = Auto(minutes=1).choose(NARROW, lambda c, part: trial([1.0, 1.0], c, 3 * took(c)), lines.append)
    without = [line for line in lines if "left out" in line]
    assert len(set(without)) == len(without) > 1
    assert not any(line.startswith(f"auto: {named(t.chain)}: ") for line in without for t in trials)


@pytest.mark.parametrize("depthwise", [False, True])
def test_cheap_chains_leave_half_of_the_budget_to_those_that_learn(depthwise: bool) -> None:
    """However many of them there are, and however close they are to each other."""
    facts = Facts(8, 8, depthwise, default=(BIAS,))
    aligned = [trial([1.0], (ALIGN, BIAS))]
    minutes = 2.01 * sum(map(took, learned(facts, aligned))) / 60
    trials = Auto(minutes=minutes).choose(facts, alike, lambda line: None)
    chains = [t.chain for t in trials]
    assert all(chain in chains for chain in learned(facts, aligned))
    assert sum(took(chain) for chain in chains if chain in cheap(facts)) <= minutes * 30


@pytest.mark.parametrize("chain", [(ALIGN, BIAS), (ALIGN, Choice("gptq"), BIAS)])
def test_a_trial_is_expected_to_take_what_the_same_methods_took(chain: Chain) -> None:
    """Whatever their parameters; and without one, as much for its cost as the slowest of others."""
    more = tuple(c._replace(parameters={**c.parameters, "headroom": 1.1}) if c.name == "align" else c for c in chain)
    known = [trial([1.0], (BIAS,), 1.0), trial([1.0], chain, 70.0), trial([1.0], (NOISE, *chain), 1000.0)]
    assert expected(more, known) == expected(chain, known) == 70
    assert expected(more, known[:1]) > expected((BIAS,), known[:1]) == 1
    assert expected(chain, []) == 0


@given(st.lists(st.tuples(st.floats(1e-3, 10), st.floats(1e-3, 10)), min_size=2, max_size=8))
def test_the_standard_error_is_the_jackknife_over_images(pairs: list[tuple[float, float]]) -> None:
    a, b = (np.array(x) for x in zip(*pairs, strict=True))
    gain, error = Trial((), a, 0).gain_over(Trial((), b, 0))
    left = [10 * np.log10(np.delete(b, i).sum() / np.delete(a, i).sum()) for i in range(len(a))]
    assert gain == pytest.approx(10 * np.log10(b.sum() / a.sum()), abs=1e-9)
    assert error == pytest.approx(np.sqrt((len(a) - 1) * np.var(left)), abs=1e-6)


def test_outputs_without_an_error_are_compared_too() -> None:
    perfect, other = trial([0.0, 0.0]), trial([0.1, 0.1])
    assert best([perfect, other]) is perfect
    assert best([other, perfect]) is perfect
    assert best([perfect, trial([0.0, 0.0])]) is perfect


# What is tried


def test_costlier_chains_stand_on_the_best_cheap_one() -> None:
    better = (ALIGN, BIAS)
    trials = Auto().choose(NARROW, tries(lambda c: [0.1, 0.1] if c == better else [1.0, 1.0]), lambda line: None)
    chains = [t.chain for t in trials]
    assert chains[0] == NARROW.default
    assert set(map(str, cheap(NARROW))) <= set(map(str, chains))
    assert (ALIGN, NOISE, Choice("adaround", {"iterations": 400})) in chains
    assert (ALIGN, Choice("gptq"), BIAS) in chains
    assert len(set(map(str, chains))) == len(chains)
    assert best(trials).chain == better


def test_rewrites_are_those_of_the_best_cheap_chain_where_the_default_beats_all_of_these() -> None:
    """The default of narrow weights learns, and rewrites by `align` alone."""
    facts = Facts(4, 8, depthwise=True, default=(ALIGN, Choice("gptq"), BIAS))
    better = (EQUALIZE, ALIGN, BIAS)

    def noise(chain: Chain) -> list[float]:
        return [0.1, 0.1] if chain == facts.default else [0.5, 0.5] if chain == better else [1.0, 1.0]

    chains = [t.chain for t in Auto().choose(facts, tries(noise), lambda line: None)]
    assert (EQUALIZE, ALIGN, Choice("gptq"), BIAS) in chains
    assert (EQUALIZE, ALIGN, NOISE, Choice("adaround", {"iterations": 400})) in chains


@pytest.mark.parametrize(
    ("weight", "activation", "methods"),
    [(16, 16, set()), (8, 8, {"gptq"}), (4, 8, {"gptq", "adaround"}), (4, 4, {"gptq", "adaround", "qdrop", "lapq"})],
)
def test_rounding_is_learned_where_it_pays(weight: int, activation: int, methods: set[str]) -> None:
    """Not above eight bits, by blocks only where activations are narrow, and there before that of single layers."""
    chains = learned(Facts(weight, activation, False, ()), [trial([1.0], (BIAS,))])
    assert {c.name for chain in chains for c in chain} - {"bias_correction", "output_mse"} == methods
    if activation < 8:
        order = ["qdrop" in [c.name for c in chain] for chain in chains]
        assert max(np.flatnonzero(order)) < len(chains) - 1
        assert chains[-1][-1].name == "adaround"


def test_all_that_is_learned_is_tried_before_further_images_judge_any_of_it() -> None:
    """Where chains are close, the budget would end with that, and the costly ones would not be tried at all."""
    calls: list[tuple[Chain, int]] = []

    def attempt(chain: Chain, part: int) -> Trial:
        calls.append((chain, part))
        return alike(chain, part)

    costly = learned(NARROW, [trial([1.0], (ALIGN, BIAS))])
    minutes = 1.01 * sum(map(took, [*cheap(NARROW), *costly])) / 60
    Auto(minutes=minutes).choose(NARROW, attempt, lambda line: None)
    parts = [part for chain, part in calls if chain in costly]
    assert parts == sorted(parts)
    assert any(c.name == "qdrop" for chain, _ in calls for c in chain)


def test_depthwise_networks_are_equalized_before_they_are_aligned() -> None:
    """Equalization moves a channel by any factor, alignment by less than two: they win together, in this order."""
    tried = cheap(Facts(8, 8, True, ()))
    assert not any(EQUALIZE in chain for chain in cheap(Facts(8, 8, False, ())))
    assert all(chain in tried for chain in [(EQUALIZE, BIAS), (EQUALIZE, ALIGN, BIAS), (EQUALIZE, ALIGN, NOISE)])
    assert all(
        chain[:2] == (EQUALIZE, ALIGN)
        for chain in learned(Facts(4, 8, True, ()), [trial([1.0], (EQUALIZE, ALIGN, BIAS))])[1:]
    )


def test_what_learns_and_wins_gets_more_steps_where_they_fit() -> None:
    def noise(chain: Chain) -> list[float]:
        return [0.1, 0.1] if any(c.name == "qdrop" for c in chain) else [1.0, 1.0]

    chains = [t.chain for t in Auto(minutes=600).choose(NARROW, tries(noise), lambda line: None)]
    learning = {c.name: c.parameters["iterations"] for c in chains[-1] if "iterations" in c.parameters}
    assert learning == {"qdrop": 2000}
    assert [c.name for c in chains[-1]] in [[c.name for c in chain] for chain in chains[:-1]]
    lines: list[str] = []
    Auto(minutes=10).choose(NARROW, lambda c, part: trial(noise(c), c, 2 * took(c)), lines.append)
    assert "qdrop(iterations=2000): left out" in lines[-1]
    chains = [t.chain for t in Auto().choose(NARROW, tries(lambda c: [1.0, 1.0]), lambda line: None)]
    assert all(c.parameters.get("iterations", 400) == 400 for chain in chains for c in chain)


def test_no_trial_begins_that_would_end_behind_the_budget() -> None:
    lines: list[str] = []
    trials = Auto(minutes=0.5).choose(NARROW, tries(lambda c: [1.0, 1.0], seconds=1000), lines.append)
    assert [t.chain for t in trials] == [NARROW.default]
    assert sum("left out, it would take about" in line for line in lines) > 3


# The images that judge


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(5, 95).map(lambda n: n / 100))
def test_every_image_either_calibrates_or_judges(sizes: list[int], share: float) -> None:
    images = iter(torch.arange(sum(sizes)).split(sizes))
    batches = [(x, x + 100) for x in images]
    total = sum(sizes)
    if not 1 <= total * round(share * 100) // 100 < total:
        return
    judged: list[int] = []
    for part in range(Auto(held_back=share).parts):
        seen, back = split(batches, share, part)
        halves = [torch.cat([b[0] for b in half]) for half in (seen, back)]
        assert sorted(torch.cat(halves).tolist()) == list(range(total))
        assert len(halves[1]) == total * round(share * 100) // 100 or part
        assert all(torch.equal(b[0] + 100, b[1]) for b in (*seen, *back))
        judged += halves[1].tolist()
    assert len(set(judged)) == len(judged)
    assert len(judged) == total or share not in (0.05, 0.1, 0.2, 0.25, 0.5)


@given(st.integers(1, 9), st.integers(1, 12), st.integers(2, 60))
def test_trials_take_the_fewest_batches_with_enough_images(size: int, count: int, images: int) -> None:
    batches = [torch.full((size, 1), float(i)) for i in range(count)]
    kept = [int(x[0]) for x in some(batches, images)]
    assert len(kept) == min(count, -(-images // size))
    gaps = np.diff([*kept, count])
    assert kept[0] == 0
    assert gaps.max() - gaps.min() <= 1, "evenly spread"


def test_a_large_calibration_set_is_for_the_run_not_for_the_trials(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, batches = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), list(torch.rand(640, 6).split(64))
    folders = tmp_path / "auto", tmp_path / "again"
    found = pow2quant.quantize(
        network, batches, methods=[{"auto": {"images": 128}}], output=folders[0], progress=False
    ).report
    assert 32 <= max(t["images"] for t in found["auto"]) <= 128
    methods = list(configuration.load(folders[0] / "config.yaml").ptq.methods or ())
    pow2quant.quantize(network, batches, methods=methods, output=folders[1], progress=False)
    assert (folders[0] / "model.encodings").read_bytes() == (folders[1] / "model.encodings").read_bytes()


def test_one_image_cannot_do_both() -> None:
    with pytest.raises(DataError, match="1 calibration images are too few"):
        split([torch.zeros(1, 3)], 0.25)


# Runs


class Watched:
    """Batches that write down when they are read."""

    def __init__(self, name: str, batches: list[tuple[Tensor, Tensor]], log: list[str]) -> None:
        self.name, self.batches, self.log = name, batches, log

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.log.append(self.name)
        return iter(self.batches)


class Log:
    """A progress that writes lines into a list."""

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines

    def note(self, text: str) -> None:
        self.lines.append(text)

    def track(self, items: object, title: str, total: int | None = None) -> object:
        return items


def test_a_run_keeps_the_chosen_chain_and_can_be_repeated(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    images = torch.from_numpy(load_digits().images[:96, None]).float() / 16
    labels = network(images).argmax(1).detach()
    log: list[str] = []
    batches = [(images[i : i + 32], labels[i : i + 32]) for i in (0, 32, 64)]
    data = (Watched("calibration", batches[:2], log), Watched("test", batches[2:], log))
    folder = tmp_path / "auto"
    result = pow2quant.quantize(network, data, methods="auto", output=folder, progress=Log(log))
    chosen = next(i for i, line in enumerate(log) if line.startswith("auto: chosen: "))
    first = next(i for i, line in enumerate(log) if line.startswith("auto: "))
    assert "test" not in log[first:chosen]
    trials = result.report["auto"]
    assert trials[0]["methods"] == ["bias_correction"]
    assert len(trials) >= 5
    assert {t["images"] for t in trials} <= {16, 32, 48, 64}
    assert max(t["images"] for t in trials) > 16
    named = configuration.load(folder / "config.yaml").ptq.methods
    assert named
    assert "auto" not in [c.name for c in named]
    methods = [{c.name: dict(c.parameters)} for c in named]
    again = pow2quant.quantize(
        network, (batches[:2], batches[2:]), methods=methods, output=tmp_path / "again", progress=False
    )
    assert again.agrees
    assert again.report["auto"] is None
    for name in ("model.onnx", "model.encodings"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_killed_in_a_trial_it_goes_on_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    tried: list[str] = []
    stop = 4
    attempted = choosing.with_methods

    def counted(job: Any, chain: Any, batches: Any = None) -> Any:
        if batches is not None:
            tried.append(named(chain))
            if len(tried) == stop:
                raise KeyboardInterrupt
        return attempted(job, chain, batches)

    monkeypatch.setattr(choosing, "with_methods", counted)
    monkeypatch.setattr(unfinished, "PAUSE", 0)
    monkeypatch.setattr(unfinished, "SHARE", 0)
    methods = [{"auto": {"held_back": 0.6}}]  # one part
    run = partial(pow2quant.quantize, network, torch.rand(32, 6), methods=methods, progress=False)
    with pytest.raises(KeyboardInterrupt):
        run(output=tmp_path / "run")
    found = run(output=tmp_path / "run")
    resumed, stop = list(tried), 0
    tried.clear()
    whole = run(output=tmp_path / "whole")
    assert resumed == [*tried[:4], *tried[3:]], "three are known, the fourth is tried again"
    assert [t["methods"] for t in found.report["auto"]] == [t["methods"] for t in whole.report["auto"]]
    assert (tmp_path / "run" / "model.onnx").read_bytes() == (tmp_path / "whole" / "model.onnx").read_bytes()
    assert not (tmp_path / "run.unfinished").exists()


def test_it_stands_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["ptq", "--method", "auto", "--method", "gpfq", "--output", str(tmp_path / "run")])
    assert status == 2
    assert "auto chooses the methods itself; name it alone" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
