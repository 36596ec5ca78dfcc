"""What a report says: sizes, provenance and threads, in words a reader can trust."""

from __future__ import annotations

import pytest

import compress
from compress.artifact import Comparison, Timing, Verification
from compress.report import Report, size_words
from compress.testing import MODELS, make


@pytest.mark.parametrize(
    ("nbytes", "words"),
    [(0, "0.0 kB"), (820, "0.8 kB"), (111_500, "111.5 kB"), (999_900, "999.9 kB"), (1_062_000, "1.06 MB")],
)
def test_sizes(nbytes: int, words: str) -> None:
    assert size_words(nbytes) == words


@pytest.fixture
def report() -> Report:
    report = compress.run(make("convnet"), "int8", example_inputs=MODELS["convnet"].inputs(2)).report
    comparison = Comparison("file vs original", "out", (2, 10), 30.0, 0.999, 0.1, 1.0)
    timing = Timing({"batch": 1}, 2.0, 4.0, 0.5, 0.01, 100, threads=2)
    report.verification = Verification("samples", (comparison,), (timing,), environment={"threads": 2})
    return report


def test_a_loss_is_said_plainly(report: Report) -> None:
    assert "2.00x SLOWER at batch 1" in report.headline()
    assert report.slower()


def test_markdown_gives_the_provenance_in_words(report: Report) -> None:
    text = report.to_markdown()
    assert "- seed: 0\n" in text
    assert "- versions: compress " in text
    assert "{" not in text and "None" not in text
    assert "2 threads; medians" in text
