"""The only metadata of this project: five plain top-level packages of an application that is not published.

There are no console scripts: every entry point is `python -m PACKAGE`.  `tests` and `benchmarks` are never installed.
The tested version sets are in requirements/; the ranges here only say what the code relies on.
"""

from setuptools import setup

setup(
    name="longview-rec",
    version="0.1.0",
    description="Train long-sequence recommendation models with sharded tables",
    license="Apache-2.0",
    python_requires=">=3.11",
    # The explicit root turns an editable install into one plain path entry, so the checkout is what runs.
    package_dir={"": "."},
    packages=[
        "attention_kernels",
        "attention_kernels.attention",
        "attention_kernels.attention.hopper",
        "attention_kernels.attention.portable",
        "attention_kernels.layer",
        "embeddings",
        "embeddings.kinds",
        "embeddings.lookups",
        "embeddings.measuring",
        "embeddings.planning",
        "embeddings.rows",
        "launch",
        "launch.schedulers",
        "pipelines",
        "pipelines.batches",
        "pipelines.prepare",
        "pipelines.prepare.log",
        "pipelines.prepare.publishers",
        "pipelines.prepare.samples",
        "pipelines.reading",
        "pipelines.storage",
        "pipelines.stream",
        "trainer",
        "trainer.checkpoint",
        "trainer.evaluation",
        "trainer.export",
        "trainer.health",
        "trainer.jobs",
        "trainer.labels",
        "trainer.models",
        "trainer.models.heads",
        "trainer.parallel",
        "trainer.report",
        "trainer.run",
        "trainer.steps",
        "trainer.tasks",
    ],
    install_requires=[
        "duckdb>=1.2",
        "isal>=1.7",
        "numpy>=2",
        "pyarrow>=20",
        "safetensors>=0.5",
        "tensorboard>=2.20",
        "tensordict>=0.10",
        "torchmetrics==1.0.3",
        "torchx==0.7.0",
        "tqdm>=4.66",
        "typer>=0.15",
    ],
    extras_require={
        # torchrec's own requirement is fbgemm-gpu, the CUDA build; the cpu set installs it without dependencies.
        "cpu": ["torch==2.13.0", "fbgemm-gpu-cpu==1.8.0", "torchrec==1.8.0", "triton==3.6.0"],
        "cuda": ["torch==2.11.0", "fbgemm-gpu==1.6.0", "torchrec==1.6.1", "triton==3.6.0"],
        "dev": ["hypothesis>=6", "import-linter>=2", "mypy>=2", "pytest>=9", "pytest-xdist>=3.8", "ruff>=0.17"],
        "kubernetes": ["kubernetes==25.3.0"],
    },
)
