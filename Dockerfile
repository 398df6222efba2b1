# The two images of the platform: `train` runs the stages, Ray and Kubeflow's steps; `serve` runs the model server alone.
#   docker build --target serve --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu -t mint-serve .
#   docker build --target train --build-arg ACCELERATOR=cuda -t mint-train .
# The CPU build of torch is not on PyPI: it comes from PyTorch's CPU index, or from a folder `wheelhouse/` beside this
# file. Everything that is installed is named with its hash in .ci/locks (made by `.ci/images lock`, for linux/amd64).
# A base of your own needs Python 3.11 as `python3` with pip and venv, Debian's apt, and the certificates of the package
# index you use.
ARG BASE_IMAGE=python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b

# What both images have around Python: no pip, no setuid files, and a place for every cache.
FROM ${BASE_IMAGE} AS base
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
RUN rm -rf /usr/local/lib/python3.11/{site,dist}-packages/{pip,setuptools,wheel,pkg_resources,_distutils_hack}* \
      /usr/lib/python3/dist-packages/{pip,setuptools,wheel,pkg_resources,_distutils_hack}* \
      /usr/{local/,}lib/python3.11/ensurepip /usr/share/python-wheels /usr/{local/,}bin/{pip,wheel}* \
 && find / -xdev -type f -perm /6000 -exec chmod a-s {} + \
 && groupadd --gid 10001 mint \
 && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin mint \
 && install -d -m 1777 /var/cache/mint
# Any user id works, also one without a name: nothing looks itself up, and all that is written goes to /tmp or to
# /var/cache/mint, which are volumes where the root is read-only. Modules are never taken from the working folder.
ENV PATH=/opt/mint/bin:/usr/local/bin:/usr/bin:/bin \
    LANG=C.UTF-8 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONSAFEPATH=1 \
    HOME=/tmp \
    USER=mint \
    LOGNAME=mint \
    XDG_CACHE_HOME=/tmp/.cache \
    MPLCONFIGDIR=/tmp/matplotlib \
    RAY_TMPDIR=/tmp/ray \
    RAY_USAGE_STATS_ENABLED=0 \
    TORCH_EXTENSIONS_DIR=/tmp/torch-extensions \
    TORCHINDUCTOR_CACHE_DIR=/tmp/torch-inductor \
    TRITON_CACHE_DIR=/tmp/triton \
    MINT_CACHE_DIR=/var/cache/mint \
    HF_HOME=/var/cache/mint/hub \
    HF_HUB_DISABLE_TELEMETRY=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /tmp
USER 10001:10001

# An environment with the locked build tools, the start of both images' environments. Nothing here asks for a compiler.
FROM ${BASE_IMAGE} AS builder
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
# DeepSpeed compiles its operators where they run, not here.
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    DS_BUILD_OPS=0
COPY .ci/locks/build.txt /locks/
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv --without-pip /opt/mint \
 && python3 -m pip --python /opt/mint/bin/python install --require-hashes -r /locks/build.txt
COPY wheelhous[e]/ /wheelhouse/
WORKDIR /opt/mint/lib/python3.11/site-packages

# The bill of materials is written by tools that are in no image.
FROM builder AS sbom-tools
COPY .ci/locks/sbom.txt /locks/
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv --without-pip /opt/sbom \
 && python3 -m pip --python /opt/sbom/bin/python install --require-hashes -r /locks/sbom.txt

# Other packages' tests are left out, and where nothing is compiled their headers too: 240 MB of the server's image.
FROM builder AS serve-packages
ARG ACCELERATOR=cpu
COPY .ci/locks/serve-${ACCELERATOR}.txt /locks/serve.txt
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m pip --python /opt/mint/bin/python install --require-hashes --use-pep517 \
      --no-build-isolation --find-links /wheelhouse -r /locks/serve.txt \
 && rm -rf torch/include pyarrow/include torch/test pandas/tests pyarrow/tests \
 && find torch/bin -type f ! -name torch_shm_manager -delete

FROM builder AS train-packages
ARG ACCELERATOR=cpu
COPY .ci/locks/train-${ACCELERATOR}.txt /locks/train.txt
COPY .ci/embedded-student.txt /locks/
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m pip --python /opt/mint/bin/python install --require-hashes --use-pep517 \
      --no-build-isolation --find-links /wheelhouse -r /locks/train.txt \
 && python3 -m pip --python /opt/mint/bin/python install --require-hashes --no-deps -r /locks/embedded-student.txt \
 && rm -rf torch/test pandas/tests pyarrow/tests \
 && find torch/bin -type f ! -name torch_shm_manager -delete

# The project itself. A change of it makes these stages and the last layer of an image anew, nothing else.
FROM scratch AS source
COPY pyproject.toml README.md /
COPY mint_lib /mint_lib
COPY components /components
COPY pipelines /pipelines

FROM serve-packages AS serve-project
COPY --from=sbom-tools /opt/sbom /opt/sbom
COPY --from=source / /source
RUN python3 -m pip --python /opt/mint/bin/python install --no-index --no-deps --use-pep517 --no-build-isolation \
      --prefix /project/opt/mint /source \
 && mkdir -p /project/usr/share/mint \
 && PYTHONPATH=/project/opt/mint/lib/python3.11/site-packages /opt/sbom/bin/cyclonedx-py environment \
      --output-reproducible --of JSON -o /project/usr/share/mint/sbom.cdx.json /opt/mint/bin/python

FROM train-packages AS train-project
COPY --from=sbom-tools /opt/sbom /opt/sbom
COPY --from=source / /source
RUN python3 -m pip --python /opt/mint/bin/python install --no-index --no-deps --use-pep517 --no-build-isolation \
      --prefix /project/opt/mint /source \
 && mkdir -p /project/usr/share/mint \
 && PYTHONPATH=/project/opt/mint/lib/python3.11/site-packages /opt/sbom/bin/cyclonedx-py environment \
      --output-reproducible --of JSON -o /project/usr/share/mint/sbom.cdx.json /opt/mint/bin/python

FROM base AS train
USER 0
# Triton and DeepSpeed compile at run time. The base's digest stands for the release whose newest compilers these are.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ libc6-dev \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log
USER 10001:10001
COPY --from=train-packages /opt/mint /opt/mint
COPY --from=train-project /project /
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.title="mint-train" \
      org.opencontainers.image.description="MINT platform: every stage, Kubeflow steps, Ray head, worker and submitter" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
CMD ["mint", "--help"]

FROM base AS serve
COPY --from=serve-packages /opt/mint /opt/mint
COPY --from=serve-project /project /
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python3", "-c", "import http.client; c = http.client.HTTPConnection('127.0.0.1', 8080, timeout=4); c.request('GET', '/healthz'); raise SystemExit(c.getresponse().status != 200)"]
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.title="mint-serve" \
      org.opencontainers.image.description="MINT platform: the model server" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
CMD ["mint", "serve", "--help"]
