"Two processes under accelerate (gloo) are one process with the same total batch."
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import two_processes

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope='module')
def both(tmp_path_factory):
    "What each of the two processes saw."
    folder = tmp_path_factory.mktemp('two')
    subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', str(HERE/'two_processes.py'), str(folder)], check=True, timeout=600,
                   env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(HERE), 'ACCELERATE_USE_CPU': 'true'})
    return [json.loads((folder/f'rank-{i}.json').read_text()) for i in range(2)]


@pytest.mark.parametrize('case', two_processes.CASES)
def test_two_are_one(both, tmp_path, case):
    one = two_processes.train(tmp_path/'one', 1, **two_processes.CASES[case]).fit()
    for got in both:
        got = got[case]
        assert got['steps'] == one.total_steps and len(got['loss']) == one.total_steps
        for name, want in dict(loss=one.log.loss, norm=one.log.grad_norm, held_out=one.evals.loss, accuracy=one.evals.accuracy).items():
            assert got[name] == pytest.approx(want.tolist(), abs=1e-5), name


def test_all_follow_the_first(both):
    for got in (b['stopped'] for b in both):
        assert got['state'] == 'stopped' and got['step'] == 9, got
        assert got['states'] == ['running', 'paused', 'running', 'stopped']
        assert got['saved'] == ['checkpoint-3', 'checkpoint-9'] and got['lr'][2] > 5*got['lr'][3]
    assert both[0]['stopped']['lr'] == both[1]['stopped']['lr']


def test_a_resumed_run_of_two_is_the_uncut_one(both):
    for joined, whole in (b['resumed'] for b in both): assert joined == whole and len(whole) > 8


def test_notebook_launcher_does_the_same(both, tmp_path):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    code = f'import two_processes, lora_nb.all\nfrom accelerate import notebook_launcher\nif __name__=="__main__": notebook_launcher(two_processes.main, ({str(tmp_path)!r},), num_processes=2, use_port="{port}")'
    (tmp_path/'cell.py').write_text(code)
    subprocess.run([sys.executable, str(tmp_path/'cell.py')], check=True, timeout=120, env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(HERE), 'ACCELERATE_USE_CPU': 'true'})
    assert [json.loads((tmp_path/f'rank-{i}.json').read_text()) for i in range(2)] == both
