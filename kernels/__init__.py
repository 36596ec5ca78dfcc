"""The table of operators: folder -> the `torch.library` operator it is about.

Each folder holds `reference.py`, the slow and obvious version that is the truth in tests, and, where
there is one, the device kernel behind the operator.
"""

from __future__ import annotations

OPS: dict[str, str] = {
    "contract_cores": "compress::contract_cores",
    "dequantize": "compress::dequantize",
    "dequantize_codebook": "compress::dequantize_codebook",
    "expand_bitmap": "compress::expand_bitmap",
    "low_rank_matmul": "compress::low_rank_matmul",
    "vq_logits": "compress::vq_logits",
    "w4_bsr_matmul": "compress::w4_bsr_matmul",
    "w4_matmul": "compress::w4_matmul",
    "w4_sparse24_matmul": "compress::w4_sparse24_matmul",
    "w4a8_matmul": "compress::w4a8_matmul",
}
