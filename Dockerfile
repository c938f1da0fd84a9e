# salmonn in a container. For a CPU:
#   docker build --tag salmonn .
#   docker run --rm -v "$PWD/videos:/videos" salmonn caption /videos --out /videos/captions.jsonl
# For NVIDIA GPUs (driver 580 or later; for older ones, the index of another CUDA version):
#   docker build --tag salmonn --build-arg TORCH="torch==2.13.0" --build-arg INDEX=https://download.pytorch.org/whl/cu130 .
#   docker run --rm --gpus all -v "$PWD/videos:/videos" -v "$HOME/.cache/huggingface:/cache/huggingface" salmonn \
#     caption /videos --out /videos/captions.jsonl --model tsinghua-ee/video-SALMONN2_plus_7B_full
FROM python:3.11-slim-bookworm

ARG TORCH=torch==2.13.0
ARG INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=demo,serve,parquet

ENV HF_HOME=/cache/huggingface PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
WORKDIR /src
# PyTorch first: it is the largest layer and changes least.
RUN pip install "$TORCH" --index-url "$INDEX"
COPY pyproject.toml README.md LICENSE ./
COPY salmonn salmonn
RUN pip install ".[$EXTRAS]" && rm -rf /src/*
WORKDIR /work
EXPOSE 7860 8000
ENTRYPOINT ["salmonn"]
CMD ["--help"]
