#!/usr/bin/env bash
# Make the virtual environment: pinned packages, Tinsmith itself, the official SDK. Run by `make setup`.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
venv=${VENV:-.venv}

"$python" - <<'PY' || { echo "Tinsmith needs Python 3.11 to 3.13; set PYTHON=python3.12, say." >&2; exit 1; }
import sys
sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PY
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }

torch_there() {
  "$venv/bin/python" -c 'import torch, sys; sys.exit(not torch.__version__.startswith("2.13."))' 2>/dev/null
}
has_gpu() { [ -e /dev/nvidia0 ] || nvidia-smi >/dev/null 2>&1; }

if ! torch_there; then
  # Without an NVIDIA GPU the default wheel would bring gigabytes of CUDA for nothing, so PyTorch's CPU
  # index is asked first. An index that does not answer is no failure: the default one is next.
  index=${TORCH_INDEX:-}
  if [ -z "$index" ] && ! has_gpu; then index=https://download.pytorch.org/whl/cpu; fi
  echo "Installing torch 2.13.0 ${index:+from $index}"
  answers() {
    "$venv/bin/python" - "$1" <<'PY'
import sys, urllib.request
try:
    urllib.request.urlopen(sys.argv[1].rstrip("/") + "/torch/", timeout=10).close()
except Exception:
    sys.exit(1)
PY
  }
  if [ -n "$index" ] && answers "$index" && pip install --index-url "$index" "torch==2.13.0"; then :
  else
    [ -z "$index" ] || echo "$index does not answer; taking the default index"
    pip install "torch==2.13.0"
  fi
fi
echo "Installing Tinsmith and what it needs"
pip install -c constraints.txt -e ".[dev]"
"$venv/bin/tinsmith" --version
"$venv/bin/python" -c 'import tinker; print("tinker", tinker.__version__)'
