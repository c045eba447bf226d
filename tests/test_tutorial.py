"The tutorial as `make lab HEADLESS=1` runs it: from start to end, on the real model, and the held-out score rises."
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_live_qlora_learns(tmp_path):
    folder = tmp_path/'lab'
    subprocess.run([sys.executable, '-c', f'from lora_nb.cli import copy_tutorials; copy_tutorials({str(folder)!r})'], check=True)
    out = subprocess.run([str(Path(sys.executable).with_name('lora-nb')), 'run', str(folder/'tutorials/01_live_qlora.ipynb')], capture_output=True, text=True, timeout=2400)
    print(out.stdout[-4000:])
    assert out.returncode == 0, out.stdout[-3000:]+out.stderr[-3000:]
    before, after, train = map(int, re.search(r'held-out answers\s+(\d+)% right before, (\d+)% after \((\d+)% of', out.stdout).groups())
    assert after >= 60 > before and train >= 80
    saved = Path(re.search(r'^adapter +(\S+)', out.stdout, re.M).group(1))
    assert (saved/'adapter_model.safetensors').exists() and 'low-rank adaptation' in re.search(r'^after +(.*)', out.stdout, re.M).group(1).lower()
