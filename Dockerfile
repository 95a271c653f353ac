# docker build --tag megalite .
# docker run --gpus all --ipc=host --volume "$PWD/data:/megalite/data" --volume "$PWD/runs:/megalite/runs" \
#     megalite python launcher/pretrain.py --config configs/smoke.json
#
# Without GPUs, torch's smaller wheels serve:
# docker build --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu --tag megalite-cpu .
FROM python:3.12-slim

# training.compile builds what it makes with it; any version serves
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /megalite
RUN useradd --uid 1000 --create-home megalite \
    && install --directory --owner megalite --group megalite . data runs

# What the project needs is a layer of its own, which a change of the project's code leaves as it is.
ARG PIP_EXTRA_INDEX_URL=""
COPY pyproject.toml README.md LICENSE ./
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
extras = [p['optional-dependencies'][name] for name in ('hf', 'eval', 'mpi')]; \
print(*p['dependencies'], *sum(extras, []), sep='\n')" > /tmp/requirements.txt \
    && pip install --no-cache-dir --requirement /tmp/requirements.txt \
    && rm /tmp/requirements.txt

COPY . .
RUN pip install --no-cache-dir --no-deps --editable . \
    && python -m compileall -q megalite data_prep

ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000
CMD ["python", "launcher/doctor.py"]
