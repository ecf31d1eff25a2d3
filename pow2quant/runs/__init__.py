"""Runs: from a configuration to a folder of files, and everything that is done with such a folder again."""

from pow2quant.runs.executors import executors, simulation_executor
from pow2quant.runs.exporting import certificate, export, resources_of
from pow2quant.runs.job import Given, Job, simulation_of
from pow2quant.runs.quantizing import quantize
from pow2quant.runs.reopening import reopened, responses
from pow2quant.runs.result import Result, Verdict
from pow2quant.runs.simulating import Simulated, simulate
from pow2quant.runs.validating import Validation, validate
from pow2quant.runs.writing import finish, ptq, quantized, score, start, write_report

__all__ = [
    "Given",
    "Job",
    "Result",
    "Simulated",
    "Validation",
    "Verdict",
    "certificate",
    "executors",
    "export",
    "finish",
    "ptq",
    "quantize",
    "quantized",
    "reopened",
    "resources_of",
    "responses",
    "score",
    "simulate",
    "simulation_executor",
    "simulation_of",
    "start",
    "validate",
    "write_report",
]
