"""Runs: from a configuration to a folder of files, and everything that is done with such a folder again."""

from pow2quant.runs.executors import executors, simulation_executor
from pow2quant.runs.exporting import export
from pow2quant.runs.job import Job, simulate
from pow2quant.runs.reopening import reopened, responses
from pow2quant.runs.validating import Validation, validate
from pow2quant.runs.writing import Result, finish, ptq, quantized, score, write_report

__all__ = [
    "Job",
    "Result",
    "Validation",
    "executors",
    "export",
    "finish",
    "ptq",
    "quantized",
    "reopened",
    "responses",
    "score",
    "simulate",
    "simulation_executor",
    "validate",
    "write_report",
]
