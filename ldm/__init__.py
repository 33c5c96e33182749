"""Latent video diffusion on Stable Diffusion v1."""

import logging

# diffusers imports torchao where it is installed, and torchao then reports each GPU kernel that this machine lacks.
# None of them is used here.
for _name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
    logging.getLogger(_name).setLevel(logging.ERROR)
