"""The packages, and beside them what a user needs of the project's top folders: configs and the tiny model."""

from setuptools import find_packages, setup

SHIPPED = {"hybrid_jax.shipped.configs": "configs", "hybrid_jax.shipped.launch.tiny_qwen3": "launch/tiny_qwen3"}

setup(
    packages=[*find_packages(include=["hybrid_jax*", "kernels_pallas*"]), *SHIPPED],
    package_dir=SHIPPED,
    package_data={"hybrid_jax.shipped.launch.tiny_qwen3": ["*.json", "*.safetensors", "*.md"]},
)
