"The tutorial as a person runs it: the real model, in a real JupyterLab, in a real Chromium."
import time
from pathlib import Path

import pytest
from browser import CHROMIUM, Lab, LivePage, chromium, jupyterlab, until
from lora_nb.cli import copy_tutorials

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason='no Chromium: python tests/install_browser.py')]


def test_run_all_watch_pause_resume_and_stop_the_live_tutorial(tmp_path):
    copy_tutorials(tmp_path/'lab')
    (tmp_path/'home').mkdir()
    with jupyterlab(tmp_path/'lab', tmp_path/'home') as at, chromium() as browser:
        lab = Lab(browser, at)
        lab.open('tutorials/01_live_qlora.ipynb').run_all()
        live = LivePage(lab).appear(300)
        until(lambda: len(live.points()) >= 3, 240, 'the loss curve has points')
        first = len(live.points())
        until(lambda: len(live.points()) > first+2, 120, 'the loss curve gains points')
        live.press_and_see('Pause', 'paused', 60)
        step = live.step()
        lab.screenshot('tutorial-live-qlora')
        time.sleep(8)
        assert live.step() == step
        live.press_and_see('Resume', 'running', 60)
        until(lambda: live.step() > step+1, 120, 'steps go on')
        live.press_and_see('Stop', 'stopped', 120)
        saved = list((tmp_path/'lab/tutorials/runs/live').glob('checkpoint-*/adapter_model.safetensors'))
        assert len(saved) == 1
        assert not lab.errors
        lab.shut_down()
        lab.close()
