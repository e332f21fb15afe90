"""Package definition; tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

DOCS = ["mkdocs-material>=9.6,<10", "mkdocstrings[python]>=0.29", "ruff"]
TEST = ["hypothesis", "psutil", "pyarrow", "pytest", "pytest-xdist", "scikit-image"]

setup(
    name="varlen_vision",
    version="0.1.0",
    description="Packed vision attention without masks and without host stops, for vision-language models",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["varlen_vision", "varlen_vision.*"]),
    package_data={
        "varlen_vision": ["py.typed"],
        "varlen_vision.kernels.costs": ["*.json"],
        "varlen_vision.compare.page": ["templates/*"],
    },
    install_requires=[
        "torch>=2.10",
        "transformers>=4.51",
        "accelerate>=1.0",
        "packaging",
        "pillow",
        "platformdirs",
        "rich",
        "typer",
    ],
    extras_require={
        "docs": DOCS,
        "flash": ["flash-attn>=2.6"],
        "flash4": ["flash-attn-4>=4.0.0b0"],
        "parquet": ["pyarrow>=15"],
        "report": ["jinja2", "matplotlib", "scikit-image"],
        "test": TEST,
        "dev": [
            *TEST,
            *DOCS,
            "mypy",
            "nox",
            "peft",
            "playwright",
            "pre-commit",
            "torchao",
            "triton; sys_platform == 'linux'",
        ],
    },
    entry_points={"console_scripts": ["varlen-vision=varlen_vision.cli:main"]},
)
