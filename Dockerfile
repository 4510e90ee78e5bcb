# syntax=docker/dockerfile:1
# CPU:  docker build --tag sensorium .
# GPU:  docker build --tag sensorium:cuda --build-arg ACCELERATOR=cuda .
# Ray:  docker build --tag sensorium:ray --build-arg EXTRAS=heif,ray .
#
#   docker run --init --publish 8000:8000 --volume sensorium-cache:/cache --env SENSORIUM_API_KEY=... sensorium MODEL
#
# Options of `sensorium serve` follow the model. Without a model the demo is served. On a GPU add `--gpus all`. Media are
# passed between processes in /dev/shm, which Docker limits to 64 MB: with `--shm-size 2g` it is used, without it /tmp is.
ARG PYTHON_VERSION=3.11

FROM python:${PYTHON_VERSION}-slim AS build
ARG ACCELERATOR=cpu
# Where the CPU builds of torch are; the builds on PyPI have CUDA.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Optional parts of the package; ray is for replicas of a model.
ARG EXTRAS=heif
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
RUN python -m venv /opt/sensorium
ENV PATH=/opt/sensorium/bin:$PATH
WORKDIR /build
COPY constraints.txt pyproject.toml README.md LICENSE ./
# In a layer of its own, which a change of the sources leaves as it is.
RUN case $ACCELERATOR in \
        cpu) pip install --no-cache-dir --no-deps --constraint constraints.txt --index-url "$TORCH_INDEX" torch ;; \
        cuda) pip install --no-cache-dir --constraint constraints.txt torch ;; \
        *) echo "ACCELERATOR must be cpu or cuda, not $ACCELERATOR" >&2; exit 1 ;; \
    esac
COPY src src
RUN pip install --no-cache-dir --constraint constraints.txt ".[$EXTRAS]"

# No compiler: CPU kernels are compiled by the LLVM in llvmlite, and kept in /cache.
FROM python:${PYTHON_VERSION}-slim
COPY --from=build /opt/sensorium /opt/sensorium
RUN useradd --uid 10001 --create-home sensorium && install --directory --owner sensorium /cache
ENV PATH=/opt/sensorium/bin:$PATH \
    HF_HOME=/cache/huggingface \
    XDG_CACHE_HOME=/cache \
    PYTHONUNBUFFERED=1
USER 10001
VOLUME /cache
EXPOSE 8000
# Unhealthy while the engine is being restarted, too. Serving on another port or with TLS needs a --health-cmd of its own.
HEALTHCHECK --interval=15s --timeout=5s --start-period=10m --start-interval=2s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# Other machines can reach a container's port only where it is published, so it listens on all its addresses.
ENTRYPOINT ["sensorium", "serve", "--host", "0.0.0.0"]
CMD ["demo"]
