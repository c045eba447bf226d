"The first tutorial: what its committed outputs show, and a run of it by `lora-nb run`, as `make lab HEADLESS=1` does, at its small setting."
import re
from pathlib import Path

import nbformat
import pytest
from outputs import result_of

PATH = Path(__file__).resolve().parent.parent/'nbs/tutorials/01_live_qlora.ipynb'


def test_the_committed_run_generalised():
    r = result_of(nbformat.read(PATH, as_version=4))
    assert r['state'] == 'finished' and r['score_after'] >= .7 > .1 > r['score_before'] and r['score_train'] >= .9
    assert r['loss_after'] < .05 < 4 < r['loss_before'] and r['peak_memory'] < 2.2*2**30 and r['seconds'] < 15*60
    assert 'low-rank adaptation' in r['after'].lower() and 'low-rank adaptation' not in r['before'].lower()


@pytest.mark.slow
def test_live_qlora_learns(live_qlora):
    out = live_qlora.out
    print(out.stdout[-4000:])
    assert out.returncode == 0, out.stdout[-3000:]+out.stderr[-3000:]
    before, after, train = map(int, re.search(r'^held-out answers +(\d+)% right before, (\d+)% after \((\d+)% of', out.stdout, re.M).groups())
    assert after >= 30 > before and train >= 40
    assert re.search(r'^first curve +moves \d+ s after', out.stdout, re.M)
    saved = Path(re.search(r'^adapter +(\S+)', out.stdout, re.M).group(1))
    assert saved == live_qlora.folder/'my-adapter' and (saved/'adapter_model.safetensors').exists()
    assert 'low-rank adaptation' in re.search(r'^after +(.*)', out.stdout, re.M).group(1).lower()
