"""Forms for speed: the fusions they avoid or reach, and that values stay the same."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

import compress
from compress.exporters.ort import Session
from compress.exporters.to_onnx import build_model


class Norms(nn.Module):
    """A residual that only the norm reads, one that others read too, and a bias, which is none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.LayerNorm(16) for _ in range(3))
        self.layer = nn.Linear(16, 16)
        self.shift = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x + self.layer(x))
        z = y + self.layer(y)
        return z + self.second(z) + self.third(x + self.shift)


def test_residuals_before_a_norm_are_not_fused_with_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Norms().eval()
    x = torch.randn(3, 5, 16)
    graph = compress.capture(module, (x,))
    compress.export(graph, tmp_path / "fast.onnx")
    plain, _ = build_model(graph, faster=False)
    ir.save(plain, tmp_path / "plain.onnx")
    results, kinds = {}, {}
    for name in ("fast", "plain"):
        loaded = tmp_path / f"{name}-loaded.onnx"
        results[name] = Session(tmp_path / f"{name}.onnx", keep_optimized=loaded)(x)[0]
        kinds[name] = Counter(node.op_type for node in onnx.load(loaded).graph.node)
    assert kinds["plain"]["SkipLayerNormalization"] and not kinds["fast"]["SkipLayerNormalization"]
    assert kinds["fast"]["Sum"] == 2
    torch.testing.assert_close(results["fast"], results["plain"], rtol=1e-6, atol=1e-6)


class Lookups(nn.Module):
    """A long lookup along the last axis, a short one, and one along another axis."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.long = nn.Buffer(torch.randint(0, 40, (300,), generator=generator, dtype=torch.uint8))
        self.short = nn.Buffer(torch.tensor([3, 1, 2]))
        self.layer = nn.Linear(8, 40)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.layer(x)
        wide = y.index_select(-1, self.long.to(torch.int32))
        return wide, y.index_select(-1, self.short), y.index_select(0, self.short % 2)


def test_long_lookups_along_the_last_axis(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    graph = compress.capture(Lookups().eval(), (x,), inputs=["x:float32[!2,rows=5,!8]"])
    path = compress.export(graph, tmp_path / "lookups.onnx").path
    kinds = Counter(node.op_type for node in onnx.load(path).graph.node)
    assert kinds["GatherElements"] == 1 and kinds["Gather"] >= 2
    stored = {i.data_type for i in onnx.load(path).graph.initializer if list(i.dims) == [300]}
    assert stored == {onnx.TensorProto.UINT8}
    for rows in (1, 7):
        x = torch.randn(2, rows, 8)
        for ours, want in zip(Session(path)(x), graph.run([x]), strict=True):
            torch.testing.assert_close(ours, want)
