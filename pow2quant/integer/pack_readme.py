"""The README of an integer pack."""

from __future__ import annotations

from typing import Any

KINDS = {
    "argmax": "result = the index of the largest code along `axis` (counted from the end), the first of equal ones.",
    "average": "`window` slides over the map as described below. result = requantize(sum of (x - zero) over it), where "
    "the shift also divides by `counts`: (sum * 2^max(0, -shift)) / (counts * 2^max(0, shift)), rounded half to "
    "even. counts: one number, or one for every place of the result's map. A global average is a window over one row.",
    "choice": "result = requantize((a - zero_a) * 2^shifts[1] where condition - zero_condition > limit, else (b - "
    "zero_b) * 2^shifts[2]); the inputs are condition, a and b; a constant of fewer dimensions repeats, as in ONNX.",
    "convolution": "accumulator = sum of weight * (x - zero) over the window + bias; result = requantize(accumulator). "
    "weight: (C_out, C_in / groups, kernel height, kernel width); output channel c reads the input channels of group "
    "c // (C_out / groups). bias: (C_out). shift: one number, or one per output channel.",
    "copy": "moves codes. Every part reads `inputs[part.input]` at read_start + sum(i_k * stride_k) and writes the "
    "result at write_start + sum(i_k * stride_k), flat indices of one sample, for all counters i_k < count_k; `loops` "
    "lists (count, stride in the input, stride in the result). A part's requantization, where there is one, is applied "
    "to (x - zero). What no part writes holds the code `fill`.",
    "dense": "accumulator = weight @ (x - zero) + bias for every row of x (its last dimension); weight: (M, K), bias: "
    "(M); result = requantize(accumulator). shift: one number, or one per output.",
    "embedding": "result[…] = table[x[…]], rows of `table` by index.",
    "extreme": "result = requantize(the larger of (a - zero_a) * 2^shifts[0] and (b - zero_b) * 2^shifts[1]), or the "
    "smaller unless `largest`; a constant of fewer dimensions repeats, as in ONNX.",
    "logsoftmaxstep": "along `axis` (counted from the end): d = largest code - x; e = exponentials[min(d, length - "
    "1)]; L = how many of `bounds` are not above the sum of e; result = requantize(-(d * 2^shift + L)).",
    "matmul": "accumulator = (a - zero_a) @ (b - zero_b), over the last two dimensions; result = "
    "requantize(accumulator).",
    "maximum": "the largest code of every window; what lies beyond the map does not count.",
    "normstep": "the definition of docs/numerics.md in integers: per row the sums of (x - zero) and of its square, one "
    "integer root, one division, and `definition`'s gain and offset; then requantize.",
    "product": "result = requantize((a - zero_a) * (b - zero_b)); a constant of fewer dimensions repeats, as in ONNX.",
    "quotient": "result = requantize(round((a - zero_a) * 2^shifts[0] / ((b - zero_b) * 2^shifts[1]))), rounded as "
    "below; 0 / 0 is 0, anything else divided by 0 is 2^18 with its sign; a constant of fewer dimensions repeats, as "
    "in ONNX.",
    "resample": "along `axes`, one after the other, result i = sum over k of weights[i][k] * value[first[i] + k], of x "
    "- zero; result = the requantized sum, where the shift also divides by `divisor`, as in an average.",
    "softmaxstep": "along `definition.axis`: d = largest code - x; e = table[min(d, length - 1)]; p = e * floor(2^R / "
    "sum of e) >> (R - 24), R = `definition.reciprocal_bits`; result = requantize(p). Where a second input is at most "
    "0.5, or where `definition.keep` (shape, and truth values as packed bits in hexadecimal) is false, x is 2^18 "
    "lower. With `levels`, p = 2^(24 - a) instead, a = how many a >= 0 have 3 e 2^a <= 2 * sum of e, and 0 from "
    "`levels` on.",
    "sum": "result = requantize((a - zero_a) * 2^shifts[0] + (b - zero_b) * 2^shifts[1]), or minus where `subtracts`; "
    "a constant of fewer dimensions repeats, as in ONNX.",
    "table": "result = table[x - low], low that of the input's tensor; one table, or one row per channel (the first "
    "dimension of a sample).",
    "view": "the same codes in the result's shape.",
}
"""What every kind of step computes."""

TEXT = """\
# A quantized network in integers

Written by pow2quant. `program.json` lists the tensors and the steps in the order of computation; nothing but the files
here is needed to compute the network. A test of pow2quant does so from these files alone.

{steps} steps; inputs: {inputs}; outputs: {outputs}. {certificate}.{pixels}

## Files

| | |
|---|---|
| `program.json` | tensors (shape, bits, signed, low, high, exponent, zero_point) and steps |
| `parameters/` | weights, biases, shifts, tables |
| `constants/` | tensors that the network does not compute |
| `golden/` | the codes of every tensor, inputs and results of every step among them, for {samples} samples |
| `certificate.json` | for every layer and channel the largest accumulator, also for hardware that sums raw codes |

Every array lies here three times, in the same order, the last index fastest:

- `.npy` for numpy, in the narrowest type.
- `.mem` for `$readmemh`: a comment with name, width and shape, then one word of `bits` bits per line in
  ceil(bits / 4) hexadecimal digits, two's complement where `signed`. -3 in 4 bits is `d`.
- `.bin` for memories: the same words of `bits` bits one behind the other without gaps, the lowest bit of each first, in
  the lowest free bit of the byte. In 2 bits, 1, 0, -1 and 1 are the byte `0x71`.

Weights of -2^a, 0 and 2^b only, with an a and a b for every output channel (the first dimension), are ternary: the
array holds the codes -1, 0 and 1 in 2 bits. Where the weights are other integers, `shifts` lists (a, b) of every
channel, and `shifts_file` is the same as an array: code 1 stands for 1 << b, code -1 for -(1 << a). Without `shifts`
the codes are the weights. Nothing has to be multiplied: accumulator = (sum of x - zero where the code is 1) << b, less
the same with -1 and a, + bias.

Shapes are those of one sample; golden arrays have the samples in front.

## Arithmetic

A code q stands for the real value 2^exponent * (q - zero_point). zero_point is the code of real zero, and what lies
beyond the edge of a map when a convolution pads it.

`requantization` turns an accumulator into codes:

    result = min(max(round(accumulator, shift) + zero, low), high)

`round(a, s)` is a / 2^s rounded to the nearest integer, and to the even one when a lies exactly halfway. With an
arithmetic shift to the right, for s > 0:

    floor = a >> s
    rest  = a - (floor << s)                 # 0 <= rest < 2^s
    half  = 1 << (s - 1)
    round = floor + (rest > half or (rest == half and floor is odd))

For s <= 0 it is a << -s. The zero point is added after rounding (it matters where it is odd). `low` and `high` already
contain a ReLU or clip that follows the layer.

`accumulator` of a step: no intermediate integer exceeds `bound` in magnitude, `bits` bits hold it. Hardware that
multiplies raw codes instead of q - zero_point folds the zero point into the bias, bias - zero_point * sum(weight), and
pads maps with the code zero_point; its sums are bounded by `raw_accumulator_max` in `certificate.json`.

`window`: all pairs are (vertical, horizontal); the input is seen as (channels, *size). The result at (y, x) reads rows
y * strides[0] - before[0] + i * dilations[0] for i < kernel[0], and columns likewise; rows and columns outside of the
map count as real zero (`convolution`, `average`) or not at all (`maximum`). A one-dimensional map is one row.

## Steps

{kinds}

## Checking a testbench

1. Load the words of an input's golden `.mem` and feed one sample, its words in order.
2. Compare what each layer gives with the golden `.mem` of the step's `output`, word for word: nothing may differ.
   Sample n of a tensor with S words begins at word n * S.
3. Begin with the first step and go on in the order of `steps`: the first tensor that differs names the faulty unit.
   When only some words differ by one, look at ties: the accumulator's lowest `shift` bits are 100…0.
"""


def readme(document: dict[str, Any], certificate: str) -> str:
    """The text for what program.json holds. certificate: its sentence."""
    steps = document["steps"]
    kinds = sorted({step["kind"] for step in steps})
    return TEXT.format(
        steps=len(steps),
        inputs=", ".join(f"`{name}`" for name in document["inputs"]),
        outputs=", ".join(f"`{name}`" for name in document["outputs"]),
        pixels=" The input's codes are the image's bytes as the camera gives them, not normalized."
        if document["pixels"]
        else "",
        certificate=certificate[:1].upper() + certificate[1:],
        samples=document["samples"],
        kinds="\n\n".join(f"**{kind}**: {KINDS[kind]}" for kind in kinds),
    )
