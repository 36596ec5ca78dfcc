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
