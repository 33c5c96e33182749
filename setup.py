"""Video Stable Diffusion: latent video diffusion built on Stable Diffusion v1."""

from setuptools import find_packages, setup

INSTALL_REQUIRES = [
    "torch>=2.11",
    "pytorch-lightning>=2.6,<3",
    "diffusers>=0.42,<0.43",  # tests use its single-file converters as an oracle; they are not a stable interface
    "transformers>=5.17,<6",
    "omegaconf>=2.3,<3",
    "einops>=0.8",
    "matplotlib>=3.8",
    "pyarrow>=18",
    "numpy>=2",
    "pillow>=11",
    "safetensors>=0.6",
    "av>=14",
    "ffmpeg-python>=0.2",
    "imageio-ffmpeg>=0.6",
    "opencv-python-headless>=4.10",
    "webdataset>=1.0",
    "tensorboard>=2.18",
    "rich>=13",
    "scenedetect-headless>=0.7,<0.8",
    "fsspec>=2025.3",
]

EXTRAS_REQUIRE = {
    "gpu": [
        "torchao>=0.18",
        "flash-attn>=2.7; platform_system == 'Linux'",
        "xformers>=0.0.35; platform_system == 'Linux'",
    ],
    # VQ autoencoders take taming-transformers' quantiser. The package asks for torchvision, which nothing here needs
    # and no extra can leave out: pip install --no-deps taming-transformers
    "vq": [],
    "wandb": ["wandb>=0.19"],
    "ray": ["ray>=2.40"],
    "remote": ["fsspec>=2025.3", "aiohttp>=3.11", "s3fs>=2025.3"],
    "dev": [
        "pytest>=8",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "ruff>=0.15",
        "torchao>=0.18",
        "ray>=2.40",
        "aiohttp>=3.11",
        "s3fs>=2025.3",
        "moto[s3,server]>=5",
    ],
}

setup(
    name="video-stable-diffusion",
    version="0.1.0",
    description="Stable Diffusion v1 with a sense of time",
    packages=find_packages(include=["ldm", "ldm.*"]),
    package_data={"ldm.data.world": ["looks.yaml"]},
    python_requires=">=3.11",
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    license="MIT",
)
