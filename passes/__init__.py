"""The table of passes: name in a recipe -> class. One line for each file of this folder."""

from __future__ import annotations

from compress.passes.cleanup import Cleanup
from compress.passes.decompose import Decompose
from compress.passes.frequency_tiers import FrequencyTiers
from compress.passes.low_rank_correction import LowRankCorrection
from compress.passes.mixed_precision import MixedPrecision
from compress.passes.pack_sparse import PackSparse
from compress.passes.prune_chita import PruneChita
from compress.passes.prune_gradual import PruneGradual
from compress.passes.prune_magnitude import PruneMagnitude
from compress.passes.prune_random import PruneRandom
from compress.passes.quantize_activations import QuantizeActivations
from compress.passes.quantize_codebook import QuantizeCodebook
from compress.passes.quantize_fp8 import QuantizeFP8
from compress.passes.quantize_weights import QuantizeWeights
from compress.passes.recover import Recover
from compress.passes.screen_logits import ScreenLogits
from compress.passes.smooth import Smooth
from compress.passes.vq_logits import VqLogits
from compress.pipeline import Pass

PASSES: dict[str, type[Pass]] = {
    "cleanup": Cleanup,
    "decompose": Decompose,
    "frequency_tiers": FrequencyTiers,
    "low_rank_correction": LowRankCorrection,
    "mixed_precision": MixedPrecision,
    "pack_sparse": PackSparse,
    "prune_chita": PruneChita,
    "prune_gradual": PruneGradual,
    "prune_magnitude": PruneMagnitude,
    "prune_random": PruneRandom,
    "quantize_activations": QuantizeActivations,
    "quantize_codebook": QuantizeCodebook,
    "quantize_fp8": QuantizeFP8,
    "quantize_weights": QuantizeWeights,
    "recover": Recover,
    "screen_logits": ScreenLogits,
    "smooth": Smooth,
    "vq_logits": VqLogits,
}
