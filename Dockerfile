# An image of Descant: docker build -t descant . (docs/guides/docker.md)
# BASE: any image with Python 3.11 or newer, or with apt to get one. A torch that it has is kept if it is new enough.
ARG BASE=python:3.11-slim
FROM ${BASE} AS base
# hadolint ignore=DL3008
RUN if ! python3 -c 'import ensurepip, sys; assert sys.version_info >= (3, 11)'; then \
      apt-get update && apt-get install -y --no-install-recommends python3 python3-venv && rm -rf /var/lib/apt/lists/*; \
    fi \
    && python3 -m venv --system-site-packages /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# What pyproject.toml asks for, in a layer of its own: a change of the source installs none of it again.
FROM base AS dependencies
# Extras of pyproject.toml, such as exchange,datasets; further options of pip, such as an index of torch for the CPU alone.
ARG EXTRAS=exchange
ARG PIP_OPTIONS=
COPY pyproject.toml /src/
RUN python -c 'import sys, tomllib; \
file = tomllib.load(open("/src/pyproject.toml", "rb")); \
extras = file["project"]["optional-dependencies"]; \
chosen = [line for name in sys.argv[1].split(",") if name for line in extras[name]]; \
print(*file["build-system"]["requires"], *file["project"]["dependencies"], *chosen, sep="\n")' "${EXTRAS}" \
      > /src/requirements.txt \
    && pip install ${PIP_OPTIONS} -r /src/requirements.txt

FROM dependencies AS wheel
COPY LICENSE README.md /src/
COPY descant /src/descant
COPY callbacks /src/callbacks
COPY datamodules /src/datamodules
COPY experiments /src/experiments
COPY modules /src/modules
COPY recipes /src/recipes
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheels /src

FROM dependencies
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels pip install --no-deps /wheels/*.whl
# Any user may run it (--user): the folders are open, and a name and a home are given where /etc/passwd has none.
ARG USER_ID=10001
RUN useradd --uid "${USER_ID}" --home-dir /cache --no-create-home --shell /bin/sh descant \
    && mkdir -p /work/runs /data /cache \
    && chown -R "${USER_ID}" /work /data /cache \
    && chmod -R 1777 /work /data /cache
ENV HOME=/cache USER=descant XDG_CACHE_HOME=/cache XDG_CONFIG_HOME=/cache/config PYTHONUNBUFFERED=1
USER ${USER_ID}
WORKDIR /work
VOLUME ["/work/runs", "/data", "/cache"]
HEALTHCHECK NONE
ENTRYPOINT ["descant"]
CMD ["--help"]
