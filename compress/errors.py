"""Every error this project raises on purpose, as one tree.

    CompressError                 anything below; the CLI prints it without a traceback
    ├── ModelFileError            the model file is missing, broken, or of a kind we cannot take
    │   └── UntrustedFileError    loading it could execute code from the file
    ├── InputSpecError            example inputs are missing, malformed, or do not fit the model
    ├── CaptureError              torch.export could not capture the module
    ├── CalibrationError          the calibration data cannot be read or does not fit the model
    ├── RecipeError               the recipe cannot be read or names what does not exist
    ├── PassError                 a pass was misconfigured or broke its contract
    ├── ExportError               the graph cannot be written for this target
    ├── VerificationError         the written file does not compute what the graph computes
    ├── GoalMissed                the file is right, but misses --max-drop or --min-speedup
    ├── OutputError               the output cannot be written
    └── MissingExtra              an optional package is not installed

A message says what was given, what was expected and what to do, in that order.
"""

from __future__ import annotations

from typing import ClassVar


class CompressError(Exception):
    """Base of the tree.

    Args:
        problem: what was given and what is wrong with it, one sentence.
        expected: what would have been right; left out where the problem says it.
        fix: what to do, preferably something that can be typed.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, problem: str, *, expected: str = "", fix: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.expected = expected
        self.fix = fix

    def __str__(self) -> str:
        lines = [self.problem]
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.fix:
            lines.append(f"  try:      {self.fix}")
        return "\n".join(lines)


class ModelFileError(CompressError):
    """The model file is missing, broken, or of a kind that cannot be taken."""


class UntrustedFileError(ModelFileError):
    """Loading the file could execute code stored in it, and nobody has said that this is fine."""


class InputSpecError(CompressError):
    """Example inputs are missing, malformed, or do not fit the model."""


class CaptureError(CompressError):
    """`torch.export` could not capture the module."""


class CalibrationError(CompressError):
    """The calibration data cannot be read, or does not fit the model."""


class RecipeError(CompressError):
    """The recipe cannot be read, or names a pass or option that does not exist."""


class PassError(CompressError):
    """A pass was misconfigured or broke its contract."""


class ExportError(CompressError):
    """The graph cannot be written for this target."""


class VerificationError(CompressError):
    """The written file does not compute what the graph computes."""

    exit_code = 4


class GoalMissed(CompressError):
    """The file is right, but misses a goal the user set (accuracy drop, speed-up)."""

    exit_code = 3


class OutputError(CompressError):
    """The output cannot be written; nothing was left under its name."""


class MissingExtra(CompressError):
    """An optional package is not installed.

    Args:
        package: the import that failed.
        extra: the extra of this distribution that brings it.
        purpose: what it is needed for, as in "to write ONNX files".
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{package} is not installed; it is needed {purpose}",
            fix=f"pip install 'compress-models[{extra}]'",
        )
