#!/usr/bin/env bash
# Draws every picture of docs/gallery.md: make.sh RUN [FOLDER], RUN of 128 pixels. Needs pip install -e '.[apps]'.
set -euo pipefail
run=$1
out=${2:-$(dirname "$0")}
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cips sample "$run" --out "$out/samples.png" --count 15 --psi 0.8 --seed 2
cips interpolate "$run" --out "$out/interpolation.gif" --count 4 --frames 48 --fps 12 --loop true --psi 0.9 --seed 2 --noise off
cips mix "$run" --out "$out/mix.png" --rows 2 --psi 0.8 --seed 2 --noise off
cips panorama "$run" --out "$out/panorama.png" --count 3 --psi 0.9 --seed 2 --noise off --magnify 2
cips panorama "$run" --out "$out/ring.png" --count 1 --wrap ring --psi 0.9 --seed 4 --noise off --magnify 2
cips blend "$run" --out "$out/blend.png" --count 3 --size 128x256 --psi 0.9 --seed 2 --noise off --magnify 2
python - "$work/mask.png" <<'PY'
import sys
from PIL import Image, ImageDraw

mask = Image.new("L", (128, 128))
ImageDraw.Draw(mask).ellipse((28, 28, 99, 99), 255)
mask.save(sys.argv[1])
PY
cips blend "$run" --out "$out/circle.png" --mask "$work/mask.png" --edge hard --psi 0.9 --seed 4 --noise off --magnify 2
cips foveate "$run" --out "$out/foveated.png" --size 192 --psi 0.9 --seed 4 --noise off
cips upscale "$run" --out "$out/upscaled.png" --factor 4 --psi 0.9 --seed 4 --noise off
cips giga "$run" --out "$work/giga.tif" --size 2048 --tile 512 --psi 0.9 --seed 4 --noise off
python - "$work/giga.tif" "$out/giga.png" <<'PY'
import sys

import tifffile
from PIL import Image

whole = Image.fromarray(tifffile.imread(sys.argv[1]))
picture = Image.new("RGB", (2 * 384 + 8, 384), "white")
picture.paste(whole.resize((384, 384), Image.Resampling.LANCZOS), (0, 0))
picture.paste(whole.crop((832, 832, 1216, 1216)), (392, 0))
picture.save(sys.argv[2], optimize=True)
PY
