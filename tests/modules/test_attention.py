"""Blocks of the image network against recorded numbers of the public ones; small inputs show the eps of norms.

Computed in float64, so only the recorded numbers are rounded.
"""

import pytest

from ldm.modules.attention import BasicTransformerBlock, CrossAttention, FeedForward, SpatialTransformer
from ldm.modules.unet import Downsample, ResBlock, Upsample
from tests.conftest import fill_by_rule, relative_error

BLOCKS = {
    "st": lambda: SpatialTransformer(64, 8, 8, depth=2, context_dim=24),
    "btb": lambda: BasicTransformerBlock(32, 4, 8, context_dim=24),
    "btb_self": lambda: BasicTransformerBlock(32, 4, 8),
    "ca": lambda: CrossAttention(32, 24, 4, 8),
    "res": lambda: ResBlock(32, 64, 96, temporal_kernel_size=None),
    "res_same": lambda: ResBlock(32, 64, 32, temporal_kernel_size=None),
    "down": lambda: Downsample(32, temporal_kernel_size=None),
    "up": lambda: Upsample(32, temporal_kernel_size=None),
    "ff": lambda: FeedForward(32),
}
pytestmark = pytest.mark.numeric
SECOND_INPUT = {"st": "context", "btb": "context", "ca": "context", "res": "emb", "res_same": "emb"}


@pytest.mark.parametrize("name", BLOCKS)
def test_block_is_the_public_one(goldens, name):
    recorded, block = {key: value.double() for key, value in goldens("blocks").items()}, BLOCKS[name]()
    block.load_state_dict(fill_by_rule({key: value.shape for key, value in block.state_dict().items()}))
    block.double().eval()
    rest = [recorded[SECOND_INPUT[name]]] if name in SECOND_INPUT else []
    for size in ("", ".small"):
        if f"{name}{size}.x" in recorded:
            assert relative_error(block(recorded[f"{name}{size}.x"], *rest), recorded[f"{name}{size}.out"]) <= 2e-5
