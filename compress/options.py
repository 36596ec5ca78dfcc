"""Options of the command line: of every command that loads a model or reads data, and of `run` alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _all(*options: _Decorator) -> _Decorator:
    """One decorator of several; help lists them in this order."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


model_options = _all(
    click.option("--model", "-m", metavar="MODULE:CALLABLE",
                 help="Builds the module when MODEL holds only weights: package.module:callable or "
                      "file.py:callable."),
    click.option("--input", "-i", "inputs", multiple=True, metavar="SPEC",
                 help='An input: "1,3,32,32" or "ids:int64[1,seq=128]". Axis 0 is the batch and '
                      "dynamic unless written !1; so is a named axis. Once for each input."),
    click.option("--kv-cache/--no-kv-cache", default=None,
                 help="Keys and values of earlier tokens as inputs and outputs, to generate text. "
                      "Default: for folders of causal language models, unless --input is given."),
    click.option("--trust", is_flag=True,
                 help="Load files that can execute code (pickled modules, exported programs)."),
)  # fmt: skip
"""How a model is loaded."""

source_options = _all(click.argument("source", metavar="MODEL", type=click.Path()), model_options)
"""What every command that loads one model takes."""

_reading = _all(
    click.option("--calibration", "-c", metavar="DATA",
                 help="Real inputs: .npz, .npy, .safetensors, a folder of images, a text file, or "
                      "module:callable."),
    click.option("--tokenizer", metavar="PATH", help="tokenizer.json or a Hugging Face folder, for text."),
    click.option("--normalize", metavar="MEAN/STD",
                 help='For images, per channel: "0.485,0.456,0.406/0.229,0.224,0.225".'),
)  # fmt: skip
_seed = click.option("--seed", default=0, show_default=True, help="Of everything random.")

data_options = _all(
    _reading,
    click.option("--samples", default=512, show_default=True, help="Calibration samples to use."),
    click.option("--max-memory", default="2GB", show_default=True, metavar="SIZE",
                 help="Memory for activations while calibrating; the rest goes to disk. Gradients "
                      "(prune_chita) must fit."),
    _seed,
)  # fmt: skip
"""What every command that reads calibration data takes."""

diff_options = _all(
    click.argument("a", metavar="A", type=click.Path()),
    click.argument("b", metavar="B", type=click.Path()),
    model_options,
    _reading,
    click.option("--samples", default=16, show_default=True, help="Samples to compare on."),
    _seed,
    click.option("--json", "as_json", is_flag=True, help="Print JSON."),
)
"""What `compress diff` takes."""

_eval = click.option(
    "--eval", "metric", metavar="perplexity:FILE|MODULE:CALLABLE",
    help="perplexity:FILE, of a language model on a text. Or your metric: takes a model, "
         "returns a number, higher is better.",
)  # fmt: skip

run_options = _all(
    click.option("--recipe", "-r", default="int8", show_default=True, metavar="NAME|FILE",
                 help="A built-in recipe (`compress recipes`) or a YAML file."),
    click.option("--output", "-o", type=click.Path(), metavar="OUT",
                 help="The file to write. Default: <MODEL>-<recipe>.onnx in the current folder."),
    click.option("--report", "report_file", type=click.Path(path_type=Path), metavar="FILE",
                 help="A report besides those beside OUT: .html, a page to look at; .md, a model card; "
                      ".json."),
    click.option("--target",
                 help="onnx, torch or tensorrt. Default: by the end of OUT (.safetensors, .engine)."),
    click.option("--decode", type=click.Choice(["run", "load"]), default="run", show_default=True,
                 help="run: weights stay packed in memory. load: decoded once when the file is loaded, at "
                      "float speed."),
    click.option("--last-logits", is_flag=True,
                 help="Of a language model, logits of the last position alone: to generate."),
    click.option("--genai", is_flag=True,
                 help="Make the folder of OUT one of onnxruntime-genai: its settings and the tokenizer "
                      "beside the model."),
    _eval,
    click.option("--max-drop", type=float, metavar="X",
                 help="Exit with 3 when the file's metric is worse than the original's by more than X."),
    click.option("--min-speedup", type=float, metavar="X",
                 help="Exit with 3 when the file is less than X times as fast at the smallest batch."),
    click.option("--batch-sizes", default="1,8,32", show_default=True, metavar="N,N,..",
                 help="Batch sizes to time; empty for no timing."),
    click.option("--threads", default=1, show_default=True, help="Threads of the runtime while timing."),
    click.option("--quiet", "-q", is_flag=True, help="Print only the headline."),
)  # fmt: skip
"""What `compress run` takes besides."""

bench_options = _all(
    click.option("--recipes", "-r", default="int8,int4", show_default=True, metavar="NAME|FILE,..",
                 help="Built-in recipes (`compress recipes`) or YAML files."),
    click.option("--peers", default="", metavar="ort",
                 help="ort: also ONNX Runtime's own quantizers that suit the model, on the same samples."),
    _eval,
    click.option("--batch-sizes", default="1,8", show_default=True, metavar="N,N,..",
                 help="Batch sizes to time; empty for no timing."),
    click.option("--threads", default="1", show_default=True, metavar="N,N,..",
                 help="Thread counts of the runtime to time at."),
    click.option("--seconds", default=1.0, show_default=True, metavar="X",
                 help="Time for each file, batch size and thread count."),
    click.option("--report", "-o", "reports", type=click.Path(path_type=Path), multiple=True, metavar="OUT",
                 help="Where to write the result: .html, a page to look at; .md, a model card; .json. "
                      "Several times for several. Default: <MODEL>-bench.json."),
    click.option("--files", "folder", type=click.Path(path_type=Path, file_okay=False), metavar="FOLDER",
                 help="Keep the files there. Default: they are not kept."),
    click.option("--quiet", "-q", is_flag=True, help="Print only the headline."),
)  # fmt: skip
"""What `compress bench` takes besides."""

tensorrt_options = _all(
    click.option("--gpu", metavar="SM,SM,..",
                 help="Of an engine: the GPUs it is for. Default: sm86,sm89,sm120."),
    click.option("--precision", type=click.Choice(["float32", "float16"]),
                 help="Of an engine: what it computes in. Default: float16."),
    *(
        click.option(f"--{name}", metavar="NAME=N,..",
                     help=f'Of an engine: {what} sizes of dynamic dimensions, such as "batch=32,seq=512".')
        for name, what in (("min", "smallest"), ("opt", "usual"), ("max", "largest"))
    ),
)  # fmt: skip
"""What target tensorrt takes, under the names of `compress.export`."""
