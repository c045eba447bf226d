"A run that is killed, at any moment, goes on from its last whole checkpoint to the very loss of the run that was not."
import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def test_forty_kills_forty_resumes(tmp_path):
    out = subprocess.run([sys.executable, str(HERE/'kills.py'), str(tmp_path), '40'], capture_output=True, text=True, timeout=900, env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(HERE)})
    assert out.returncode == 0, out.stderr[-3000:]
    got = json.loads(out.stdout.splitlines()[-1])
    kills = got['kills']
    assert len(kills) == 40 and sum(k['inside'] for k in kills) >= 10
    assert all(k['final'] and k['same'] and k['cut_right'] and k['resumed_at'] == k['newest'] for k in kills), [k for k in kills if not k['final']]
    assert len({k['resumed_at'] for k in kills}) > 5
    assert not any(k['left'] for k in kills), 'what a killed save left behind was not cleared'
