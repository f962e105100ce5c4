# One image that serves (`python -m weighting_service`) and trains (`python -m trainer_client.run`).
FROM python:3.11-slim

ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore

RUN useradd --create-home --uid 10001 weighbridge \
    && mkdir /state /runs \
    && chown weighbridge /state /runs

WORKDIR /src

# torch first, in a layer of its own: it is by far the largest. TORCH_INDEX_URL names a package index that has the build
# wanted, CPU or CUDA; without it pip takes the build that its configured indexes offer.
ARG TORCH_INDEX_URL=
COPY constraints.txt ./
RUN pip install -c constraints.txt ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch

# The dependencies of the package without its source, so that a change of code reuses this layer.
ARG EXTRAS="server tokens torch s3 otel"
COPY pyproject.toml ./
RUN python -c "import sys, tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
print(*p['dependencies'], *(d for extra in sys.argv[1:] for d in p['optional-dependencies'][extra]), sep='\n')" $EXTRAS > requirements.txt \
    && pip install -c constraints.txt -r requirements.txt

COPY . .
RUN pip install --no-deps .

USER weighbridge
WORKDIR /home/weighbridge
ENV WEIGHBRIDGE_HOST=0.0.0.0 WEIGHBRIDGE_GRPC_PORT=50051 WEIGHBRIDGE_REST_PORT=8080 WEIGHBRIDGE_STATE=/state
VOLUME /state
EXPOSE 50051 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/readyz', timeout=4)"]
ENTRYPOINT ["python", "-m", "weighting_service"]
