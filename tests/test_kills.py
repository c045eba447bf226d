"A run that is killed, at any moment, goes on from its last whole checkpoint to the very loss of the run that was not."
import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def test_forty_kills_forty_resumes(tmp_path):
    start = lambda seed: subprocess.Popen([sys.executable, str(HERE/'kills.py'), str(tmp_path/str(seed)), '20', str(seed)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(HERE)})
    kills = []
    for p in [start(0), start(1)]:          # at once: each keeps one core busy
        out, err = p.communicate(timeout=900)
        assert p.returncode == 0, err[-3000:]
        kills += json.loads(out.splitlines()[-1])['kills']
    assert len(kills) == 40 and sum(k['inside'] for k in kills) >= 10
    assert all(k['final'] and k['same'] and k['cut_right'] and k['resumed_at'] == k['newest'] for k in kills), [k for k in kills if not k['final']]
    assert len({k['resumed_at'] for k in kills}) > 5
    assert not any(k['left'] for k in kills), 'what a killed save left behind was not cleared'
