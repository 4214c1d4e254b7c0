# docker build --build-arg EXTRA=tpu --tag safetydpo .      (or cuda13; the CPU alone: EXTRA=gcs)
# docker run safetydpo train --config hate                  (GPUs: --gpus all --ipc=host)
FROM python:3.11-slim

ARG EXTRA=tpu
WORKDIR /safetydpo
# The dependencies first: they are large, and seldom change.
COPY pyproject.toml README.md LICENSE ./
COPY safetydpo_jax/__init__.py safetydpo_jax/
COPY safetydpo_jax/emoji/NOTICE-artwork.md safetydpo_jax/emoji/
RUN pip install --no-cache-dir ".[${EXTRA},gcs]"
COPY . .
RUN pip install --no-cache-dir --no-deps --force-reinstall . && rm -rf /safetydpo/*
ENTRYPOINT ["safetydpo"]
