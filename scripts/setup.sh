#!/usr/bin/env bash
# Make the virtual environment: pinned packages, Tinsmith itself, the official SDK. Run by `make setup`.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
venv=${VENV:-.venv}
export PIP_REQUIRE_VIRTUALENV=1 # whatever is in $venv, nothing is ever installed outside one

fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }
if [ -e "$venv/bin/python" ] && [ ! -e "$venv/pyvenv.cfg" ]; then
  echo "$venv is no virtual environment: remove it." >&2
  exit 1
elif [ -x "$venv/bin/python" ]; then
  fits "$venv/bin/python" || {
    echo "$venv was made with $("$venv/bin/python" -V 2>&1), and Tinsmith needs Python 3.11 to 3.13: remove it." >&2
    exit 1
  }
elif ! fits "$python"; then
  found=$("$python" -V 2>&1) || found="it does not run"
  echo "Tinsmith needs Python 3.11 to 3.13; $python: $found. Name another: make setup PYTHON=python3.12" >&2
  exit 1
fi
# A folder without pip is what a venv that failed half-way leaves behind.
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }

torch_there() {
  "$venv/bin/python" -c 'import torch; v = torch.__version__; print(v); assert v.startswith("2.13.")' 2>/dev/null
}
has_gpu() { [ -e /dev/nvidia0 ] || nvidia-smi >/dev/null 2>&1; }
answers() { # whether the index $1 has a page for torch, within ten seconds
  case $1 in http*) ;; *) return 0 ;; esac
  "$venv/bin/python" - "$1" <<'PY'
import sys, urllib.request
try:
    urllib.request.urlopen(sys.argv[1].rstrip("/") + "/torch/", timeout=10).close()
except Exception:
    sys.exit(1)
PY
}

if ! torch=$(torch_there); then
  # Without an NVIDIA GPU the default wheel would bring gigabytes of CUDA for nothing, so PyTorch's CPU
  # index is asked first. An index that does not answer is no failure: the default one is next.
  index=${TORCH_INDEX:-}
  if [ -z "$index" ] && ! has_gpu; then index=https://download.pytorch.org/whl/cpu; fi
  echo "Installing torch 2.13.0${index:+ from $index}"
  from_index() { answers "$index" && pip install --retries 1 --timeout 15 --index-url "$index" torch==2.13.0; }
  if [ -z "$index" ] || ! from_index; then
    [ -z "$index" ] || echo "$index did not give it; taking pip's default index"
    pip install torch==2.13.0
  fi
  torch=$(torch_there)
fi
echo "Installing Tinsmith and what it needs beside torch $torch"
# The torch that is there stays, be it another 2.13 than the tests' or another build of it.
sed "s/^torch==.*/torch==$torch/" constraints.txt > "$venv/constraints.txt"
pip install -c "$venv/constraints.txt" -e ".[dev]"
# The cookbook's converters judge the adapter format in tests. What else it needs (and partly cannot be had:
# tml-renderers) they do not.
pip install --no-deps tinker-cookbook==0.6.1 || echo "without tinker-cookbook: tests with its converters are skipped"
"$venv/bin/tinsmith" --version
"$venv/bin/python" -c 'import tinker; print("tinker", tinker.__version__)'
