"""The benchmark that writes docs/results.md: what it measures, that it continues, and that the page shows its rows."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))
import methods as bench  # noqa: E402

sys.path.remove(str(ROOT / "benchmarks"))

QUICK = ["--network", "digits-cnn", "--data", "digits", "--calibration-batches", "2", "--test-batches", "2"]
EMPTY = f"# Results\n\nAbove.\n\n{bench.BEGIN}{bench.END}\n\nBelow.\n"


def test_the_page_shows_the_rows() -> None:
    page = ROOT / "docs" / "results.md"
    assert page.read_text(encoding="utf-8") == bench.put(page, bench.load(ROOT / "docs" / "results.json"))


@pytest.mark.parametrize(
    ("chain", "expected"),
    [
        ("none", "none"),
        ("output_mse+bias_correction", "output_mse, bias_correction"),
        ("gpfq: {lambda_: 2, regularizer: L0}", "gpfq: {lambda_: 2, regularizer: L0}"),
    ],
)
def test_chains_are_written_one_way(chain: str, expected: str) -> None:
    found = bench.written(bench.methods(chain))
    assert found == bench.written(bench.methods(found)) == expected


def test_a_chain_that_continues_another_is_what_it_is_alone() -> None:
    """What is kept comes before the first random number; the seed still decides what follows."""
    x = bench.torch.rand(16, 1, 8, 8, generator=bench.torch.Generator().manual_seed(0))
    model, plan = bench.models.digits_cnn().eval(), bench.QuantPlan.default(3, 8)
    chain = "output_mse, adaround: {iterations: 3}, bias_correction"
    with bench.torch.random.fork_rng(devices=[]):
        shared = bench.Chains(model, [x])
        shared.simulation("output_mse, adaround: {iterations: 3}", plan)
        assert [key[2] for key in shared._kept] == ["output_mse"]
        found, alone, other = (
            chains.simulation(chain, plan, seed=seed)[0]
            for chains, seed in ((shared, 1), (bench.Chains(model, [x]), 1), (shared, 2))
        )
    names = [name for name, _ in found.network.named_parameters()]
    assert found.encodings() == alone.encodings()
    assert all(bench.torch.equal(found.parameter(name), alone.parameter(name)) for name in names)
    assert not all(bench.torch.equal(found.parameter(name), other.parameter(name)) for name in names)


def test_what_is_measured_and_that_it_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of an untrained network: no method at 2 bits does harm, and a second call adds only what is not there."""
    rows, page = tmp_path / "rows.json", tmp_path / "page.md"
    page.write_text(EMPTY, encoding="utf-8")

    def call(*more: str) -> list[bench.Row]:
        files = ["--rows", str(rows), "--page", str(page)]
        monkeypatch.setattr(sys, "argv", ["methods.py", *QUICK, *files, *more])
        with bench.torch.random.fork_rng(devices=[]):
            bench.torch.manual_seed(0)
            bench.main()
        return bench.load(rows)

    first = call("--widths", "2:4", "8:float")
    assert [row.experiment.activation_bits for row in first] == [4, None]
    coarse, fine = first
    assert coarse.sqnr_db + 20 < fine.sqnr_db
    assert coarse.zeros > fine.zeros
    assert coarse.difference == pytest.approx(coarse.accuracy - coarse.float_accuracy, abs=0.002)
    assert 0 < coarse.interval < 100

    chain = "adaround: {iterations: 2}"
    both = call("--widths", "2:4", "--chains", "none", chain, "output_mse", "--seeds", "0", "1")
    assert both[:2] == first
    assert [(row.experiment.chain, row.experiment.seed) for row in both[2:]] == [
        (chain, 0),
        (chain, 1),
        ("output_mse", None),
    ]
    shown = page.read_text(encoding="utf-8")
    assert shown.startswith("# Results\n\nAbove.\n\n")
    assert shown.endswith("\n\nBelow.\n")
    assert "## digits-cnn: W2A4\n" in shown
    assert "## digits-cnn: W8, activations float\n" in shown
    assert f"| `{chain}` | 0, 1 |" in shown
    assert "| `output_mse` | any |" in shown
    assert shown == bench.put(page, both), "written again, nothing changes"
