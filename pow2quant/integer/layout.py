"""In which order a program takes its images: channels first, as PyTorch has them, or last, as cameras do."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from pow2quant.errors import UnsupportedModelError
from pow2quant.integer.ops.copy import Copy, Part

if TYPE_CHECKING:
    from pow2quant.integer.program import Program, Step, Tensor

LAYOUTS = ("nchw", "nhwc")
"""Legal orders; the batch, N, is the caller's."""

MAP = 3
"""Dimensions of a sample that is an image."""


def channels_last(program: Program) -> Program:
    """The program with every input (C, H, W) taken as (H, W, C); its first steps move the codes.

    Raises UnsupportedModelError where no input is an image, or an image is an output, too.
    """
    tensors = dict(program.tensors)
    steps: list[Step] = []
    renamed: dict[str, str] = {}
    for name in program.inputs:
        image = tensors[name]
        if len(image.shape) != MAP:
            continue
        if name in program.outputs:
            raise UnsupportedModelError(f"{name}: an input that is an output too has one order")
        renamed[name] = f"{name}.channels_first"
        tensors[renamed[name]] = replace(image, name=renamed[name])
        tensors[name] = replace(image, shape=(*image.shape[1:], image.shape[0]))
        steps.append(_moved(tensors[name], tensors[renamed[name]]))
    if not renamed:
        raise UnsupportedModelError("no input is an image (channels, height, width): layout nhwc is for these")
    steps += [replace(step, inputs=tuple(renamed.get(n, n) for n in step.inputs)) for step in program.steps]
    return replace(program, tensors=tensors, steps=tuple(steps))


def _moved(last: Tensor, first: Tensor) -> Copy:
    read = np.arange(last.size).reshape(last.shape).transpose(2, 0, 1)
    part = Part.of(0, read, np.arange(first.size).reshape(first.shape))
    return Copy(first.name, (last.name,), first.name, (part,))
