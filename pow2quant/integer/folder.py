"""Writing a whole folder at once: it appears complete, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from pow2quant.errors import OutputError


@contextmanager
def staged(target: Path, mark: str) -> Iterator[Path]:
    """A folder to write into that takes the place of `target` when all went well, and vanishes otherwise.

    mark: the file by which an older folder of the same kind is known, which may be replaced; an empty one may be too.
    Raises OutputError for any other, and where the disk does not allow it.
    """
    target = target.absolute()
    if target.exists() and not (target.is_dir() and ((target / mark).is_file() or not any(target.iterdir()))):
        raise OutputError(f"{target}: holds no {mark}, so it is not what would be written, and is not replaced")
    staging, old = (target.with_name(f".{target.name}.{uuid4().hex[:8]}.{kind}") for kind in ("partial", "old"))
    try:
        staging.mkdir(parents=True)
        yield staging
        if target.exists():
            target.rename(old)
        os.replace(staging, target)
    except OSError as error:
        if old.exists() and not target.exists():
            old.rename(target)
        raise OutputError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
