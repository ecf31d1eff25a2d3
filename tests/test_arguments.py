"""Arguments of the Python calls that are no paths, no configurations and no numbers: each is named in one line."""

from pathlib import Path
from typing import Any

import pytest

from pow2quant import runs
from pow2quant.config import RunConfig
from pow2quant.errors import ConfigError
from pow2quant.runs import ptq
from pow2quant.three_steps import qat


@pytest.mark.parametrize("call", [ptq, qat])
@pytest.mark.parametrize(
    ("configuration", "output", "progress", "words"),
    [
        ({"seed": 1}, "run", False, "takes a RunConfig and a folder; for a network in Python: "),
        (RunConfig(), None, False, "output: expected a path, got a NoneType"),
        (RunConfig(), "run", "yes", "progress: 'yes' is not legal"),
    ],
)
def test_what_the_calls_do_not_take_is_said(
    call: Any,
    configuration: Any,
    output: Any,
    progress: Any,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=words):
        call(configuration, output, progress=progress)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"progress": "yes"}, "progress: 'yes' is not legal"),
        ({"max_batches": -1}, "max_batches: -1 is not legal; legal: an integer from 0 up"),
        ({"max_batches": 1.5}, "max_batches: 1.5 is not legal"),
        ({"seed": "x"}, "seed: 'x' is not legal"),
        ({"encodings": 5}, "encodings: expected a path, got a int"),
        ({"config": 5}, "config: expected a RunConfig, a mapping or a YAML file, got a int"),
        ({"config": {"sede": 1}}, "sede: unknown key, did you mean seed"),
    ],
)
def test_what_validate_does_not_take_is_said(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        runs.validate(str(tmp_path), **options)


@pytest.mark.parametrize("call", [runs.validate, runs.certificate, lambda source: runs.export(source, "qdq")])
@pytest.mark.parametrize("source", [None, 5, b"run"])
def test_what_is_no_source_is_said(call: Any, source: Any) -> None:
    with pytest.raises(ConfigError, match=f"source: expected a path, got a {type(source).__name__}"):
        call(source)
