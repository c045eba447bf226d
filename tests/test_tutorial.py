"The tutorial as `make lab HEADLESS=1` runs it: from start to end, on the real model, and the held-out score rises."
import re
from pathlib import Path

import pytest


@pytest.mark.slow
def test_live_qlora_learns(live_qlora):
    out = live_qlora.out
    print(out.stdout[-4000:])
    assert out.returncode == 0, out.stdout[-3000:]+out.stderr[-3000:]
    before, after, train = map(int, re.search(r'^held-out answers +(\d+)% right before, (\d+)% after \((\d+)% of', out.stdout, re.M).groups())
    assert after >= 60 > before and train >= 80
    assert re.search(r'^first curve +moves \d+ s after', out.stdout, re.M)
    saved = Path(re.search(r'^adapter +(\S+)', out.stdout, re.M).group(1))
    assert saved == live_qlora.folder/'my-adapter' and (saved/'adapter_model.safetensors').exists()
    assert 'low-rank adaptation' in re.search(r'^after +(.*)', out.stdout, re.M).group(1).lower()
