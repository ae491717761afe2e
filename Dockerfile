# This file builds two images:
#
#   docker build -t vitrail .
#       The whole service. torch's default build runs on NVIDIA GPUs and on CPUs.
#   docker build -t vitrail-cpu --build-arg TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu .
#       The same with PyTorch's CPU-only build of torch, which is gigabytes smaller.
#   docker build -t vitrail-ray --build-arg EXTRAS=postgres,ray .
#       The same with Ray, for `vitrail ray`.
#   docker build -t vitrail-gpu --build-arg EXTRAS=postgres,gpu .
#       The same with torchao and torchcodec, for int8, fp8 and JPEG decoding on NVIDIA GPUs.
#   docker build -t vitrail-gateway --target gateway .
#       Only the gateway, without torch.
#
# `make images` builds them without a Docker engine.
ARG PYTHON_VERSION=3.11

FROM python:${PYTHON_VERSION}-slim AS base
RUN groupadd --gid 10001 vitrail \
 && useradd --uid 10001 --gid 10001 --create-home vitrail \
 && install -d -o vitrail /var/lib/vitrail
ENV PATH=/opt/vitrail/bin:$PATH \
    VITRAIL_HOST=0.0.0.0
ENTRYPOINT ["vitrail"]

FROM python:${PYTHON_VERSION}-slim AS build
# pip is only in this stage: it installs into another environment, which is what is served.
RUN python -m venv /opt/pip && python -m venv --without-pip /opt/vitrail
ENV PATH=/opt/pip/bin:$PATH \
    PIP_PYTHON=/opt/vitrail/bin/python \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE deploy/remove-leftovers.sh ./

FROM build AS build-gateway
COPY deploy/gateway-requirements.txt ./
RUN pip install -c constraints.txt -r gateway-requirements.txt
COPY models models
COPY service service
COPY vitrail_client vitrail_client
RUN pip install --no-deps . && sh remove-leftovers.sh

FROM base AS gateway
COPY --from=build-gateway /opt/vitrail /opt/vitrail
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
CMD ["gateway"]

FROM build AS build-all
ARG TORCH_INDEX_URL=
RUN grep -E '^(torch|torchvision)==' constraints.txt > torch.txt \
 && pip install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} -r torch.txt
COPY models models
COPY service service
COPY vitrail_client vitrail_client
ARG EXTRAS=postgres
RUN pip install -c constraints.txt ".[$EXTRAS]" && sh remove-leftovers.sh

FROM base
# rasterio's wheel needs the system's libexpat. KubeRay starts Ray, where it is installed, from a
# login shell, which has a PATH of its own.
RUN apt-get update \
 && apt-get install -y --no-install-recommends libexpat1 \
 && rm -rf /var/lib/apt/lists/* \
 && ln -s /opt/vitrail/bin/ray /usr/local/bin/ray
COPY --from=build-all /opt/vitrail /opt/vitrail
ENV VITRAIL_STORE=/var/lib/vitrail \
    HF_HOME=/var/lib/vitrail/hub
USER 10001:10001
VOLUME /var/lib/vitrail
EXPOSE 8000 8001 8002
# For `vitrail serve`. docker-compose.yml has another check for workers, which do not serve HTTP.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
CMD ["serve"]
