"""Pictures of a layer profile, by matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import MissingExtra, OutputError

if TYPE_CHECKING:
    from compress.layer_profile import Profile

FORMATS = (".svg", ".png", ".pdf")


def check(path: Path) -> None:
    """Find out before any work is done whether a picture can be drawn here.

    Raises:
        MissingExtra: matplotlib is not installed.
        OutputError: the name ends in no format, or the folder is not there.
    """
    if path.suffix not in FORMATS:
        raise OutputError(f"{path} is no picture", expected=f"a name that ends in {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise OutputError(f"there is no folder {path.parent}")
    _matplotlib()


def draw(profile: Profile, path: Path) -> Path:
    """One panel for each method, damage against size with a line for each layer, and one with ranks.

    Early layers are dark, deep ones bright. The same profile gives the same bytes.

    Raises:
        MissingExtra, OutputError: see `check`.
    """
    check(path)
    matplotlib = _matplotlib()
    # the same salt and no date: the same profile is the same file
    with matplotlib.rc_context({"svg.hashsalt": "compress"}):
        figure = _figure(profile, matplotlib)
        undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix)
        part = path.with_name(f".{path.name}.part")
        try:
            figure.savefig(part, dpi=120, format=path.suffix[1:], metadata=undated)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    return path


def _figure(profile: Profile, matplotlib: Any) -> Any:
    from matplotlib.figure import Figure

    methods = list(dict.fromkeys(p.method for layer in profile.layers for p in layer.points))
    count = len(methods) + 1
    figure = Figure(figsize=(4 * min(3, count), 3.4 * -(-count // 3)), layout="constrained")
    axes = figure.subplots(-(-count // 3), min(3, count), squeeze=False).flatten()
    colours = matplotlib.colormaps["viridis"]
    last = max(1, len(profile.layers) - 1)
    for axis, method in zip(axes, methods, strict=False):
        for depth, layer in enumerate(profile.layers):
            points = sorted((p.rate, p.damage) for p in layer.points if p.method == method and p.damage > 0)
            axis.plot(*zip(*points, strict=True), ".-", color=colours(depth / last)) if points else None
        axis.set(title=method, xlabel="bytes, as a fraction", ylabel="damage", yscale="log")
    _ranks(axes[len(methods)], profile, colours, last)
    for axis in axes[count:]:
        axis.remove()
    figure.suptitle(f"{profile.unit}\n{profile.depth()}", fontsize=9)
    return figure


def _ranks(axis: Any, profile: Profile, colours: Any, last: int) -> None:
    seen = "entropy of the outputs"
    for depth, layer in enumerate(profile.layers):
        rank = layer.ranks.get(seen, layer.ranks["entropy"]) / layer.ranks["full"]
        axis.bar(depth, rank, color=colours(depth / last))
    axis.set(title="effective rank", xlabel="depth", ylabel="fraction of the full rank", ylim=(0, 1))


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtra("matplotlib", "plot", "to draw a picture") from error
    return matplotlib
