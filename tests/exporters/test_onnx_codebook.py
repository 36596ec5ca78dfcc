"""Codebook weights in written files: exact for every reader, as small as the encoding, folded at load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.codebook import CodebookEncoding, CodebookWeight, encode_codebook
from compress.exporters.ort import Session, decoded_on_every_call
from compress.testing import MODELS, assert_close, make

onnx = pytest.importorskip("onnx", reason="needs the onnx extra")
pytest.importorskip("onnxruntime", reason="needs the onnx extra")


def any_codes(weight: Tensor, bits: int, group_size: int) -> CodebookWeight:
    """Codes that have nothing to do with the weight: the file must hold exactly these."""
    generator = torch.Generator().manual_seed(bits)
    encoding = CodebookEncoding("kmeans", bits, group_size)
    rows, columns = weight.shape[0], weight[0].numel()
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    table = torch.cat([torch.zeros(1), torch.randn(2**bits - 1, generator=generator)]).sort().values
    scales = torch.randn(rows, encoding.groups(columns), generator=generator) / columns**0.5
    return encode_codebook(codes, table, scales, encoding, tuple(weight.shape), weight.dtype)


def written(graph: compress.Graph, path: Path, bits: int, group_size: int) -> compress.Artifact:
    graph = graph.copy()
    for site in graph.sites():
        if site.weight not in graph.encodings:
            graph.set_encoding(site.weight, any_codes(graph.weight(site.weight), bits, group_size))
    return compress.export(graph, path)


@pytest.mark.parametrize(
    ("name", "bits", "group_size"),
    [("convnet", 3, 16), ("tied_lm", 4, 32), ("encoder", 2, -1)],
)
def test_every_reader_gets_exactly_these_values(
    name: str, bits: int, group_size: int, tmp_path: Path
) -> None:
    graph = compress.capture(make(name), MODELS[name].inputs(2), inputs=MODELS[name].specs)
    artifact = written(graph, tmp_path / "model.onnx", bits, group_size)
    assert artifact.proof_db > 90
    assert {form.weight for form in artifact.lowered} == set(artifact.graph.encodings)
    # also as the runtime deploys it, and with nothing but float weights left to multiply by
    session = Session(artifact.path)
    for batch in (1, 5):
        inputs = MODELS[name].inputs(batch)
        for want, have in zip(artifact.graph.run(inputs), session(*inputs), strict=True):
            assert_close(want, have, db=90)
    decoders = {node: form.weight for form in artifact.lowered for node in form.nodes}
    assert decoded_on_every_call(artifact.path, decoders) == []


class Lookups(nn.Module):
    """Tables whose rows end within a byte, a unit of bytes, or a group."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(11, columns) for columns in (7, 53, 40, 53)])

    def forward(self, ids: Tensor) -> Tensor:
        return torch.cat([table(ids) for table in self.tables], -1)


def test_lookups_decode_only_the_rows_they_read(tmp_path: Path) -> None:
    ids = torch.tensor([[3, 0, 10], [1, 1, 2]])
    graph = compress.capture(Lookups(), (ids,)).copy()
    for site, (bits, group_size) in zip(graph.sites(), ((2, 16), (3, 16), (3, -1), (4, 16)), strict=True):
        graph.set_encoding(site.weight, any_codes(graph.weight(site.weight), bits, group_size))
    artifact = compress.export(graph, tmp_path / "model.onnx")
    assert {form.loads_as for form in artifact.lowered} == {"decoded row by row"}
    assert torch.equal(Session(artifact.path)(ids)[0], graph.run([ids])[0])


def test_the_file_is_as_small_as_the_encoding(tmp_path: Path) -> None:
    bits = 3
    graph = compress.capture(nn.Linear(768, 512, bias=False), (torch.zeros(2, 768),))
    artifact = written(graph, tmp_path / "model.onnx", bits, 64)
    stored = artifact.graph.encodings["weight"].nbytes
    assert stored == CodebookEncoding("kmeans", bits, 64).nbytes(512, 768)
    assert stored < artifact.nbytes < 1.02 * stored + 3000  # the graph itself takes 2 to 3 kB


def test_half_precision_weights(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Embedding(20, 32), nn.Linear(32, 16)).half().eval()
    ids = torch.tensor([[1, 2], [3, 4]])
    artifact = written(compress.capture(module, (ids,)), tmp_path / "model.onnx", 4, 16)
    assert artifact.proof_db > 50
