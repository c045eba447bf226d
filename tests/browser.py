"A JupyterLab of its own and a Chromium to look at it, for the browser tests."
import json, os, re, secrets, shutil, signal, subprocess, sys, time
from contextlib import contextmanager
from pathlib import Path
import nbformat
from playwright.sync_api import sync_playwright

ARTIFACTS = Path(__file__).resolve().parent.parent/'test-artifacts'
CHROMIUM = next((p for p in map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome')) if p), None)
FLAGS = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-background-networking', '--disable-component-update', '--disable-sync', '--no-first-run']
SETTINGS = {  # no news prompt, every cell in the page, no dialog about kernels
    '@jupyterlab/apputils-extension/notification': dict(fetchNews='false', checkForUpdates=False),
    '@jupyterlab/notebook-extension/tracker': dict(windowingMode='none', autoStartDefaultKernel=True),
}


def notebook(path, *cells):
    "Write a notebook of code cells."
    nb = nbformat.v4.new_notebook(metadata=dict(kernelspec=dict(name='python3', display_name='Python 3', language='python')))
    nb.cells = [nbformat.v4.new_code_cell(c) for c in cells]
    nbformat.write(nb, path)
    return Path(path)


def until(true, seconds=300, what=''):
    "Wait until `true()` is true; returns what it gave."
    end = time.monotonic()+seconds
    while time.monotonic() < end:
        if got := true(): return got
        time.sleep(.1)
    raise AssertionError(f"After {seconds} s still not: {what or true}")


@contextmanager
def jupyterlab(folder, home):
    "JupyterLab over `folder`, with its settings and state in `home`; gives (address, token)."
    folder, home, token = Path(folder), Path(home), secrets.token_hex(16)
    env = dict(os.environ, JUPYTER_CONFIG_DIR=str(home/'config'), JUPYTER_RUNTIME_DIR=str(home/'runtime'), JUPYTER_DATA_DIR=str(home/'data'),
               JUPYTERLAB_SETTINGS_DIR=str(home/'settings'), JUPYTERLAB_WORKSPACES_DIR=str(home/'workspaces'), IPYTHONDIR=str(home/'ipython'))
    for name, value in SETTINGS.items():
        path = home/'settings'/f'{name}.jupyterlab-settings'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
    log = open(home/'jupyterlab.log', 'w')
    server = subprocess.Popen([sys.executable, '-m', 'jupyterlab', '--no-browser', '--port=0', '--allow-root', f'--IdentityProvider.token={token}', f'--ServerApp.root_dir={folder}',
                               '--MappingKernelManager.cull_idle_timeout=300', '--MappingKernelManager.cull_interval=60', '--ServerApp.shutdown_no_activity_timeout=600'],  # ends by itself if the test is killed
                              cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        def port():
            assert server.poll() is None, (home/'jupyterlab.log').read_text()[-3000:]
            return next((json.loads(p.read_text())['port'] for p in (home/'runtime').glob('jpserver-*.json')), None)
        yield f"http://localhost:{until(port, what='JupyterLab listens')}", token
    finally:
        server.send_signal(signal.SIGTERM)
        try: server.wait(20)
        except subprocess.TimeoutExpired: os.killpg(server.pid, signal.SIGKILL)
        log.close()


@contextmanager
def chromium():
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Lab:
    "One page of JupyterLab with a notebook open. `errors` collects what the browser's console called an error."
    def __init__(self, browser, server, width=1500, height=1000):
        (self.address, self.token), self.errors = server, []
        self.context = browser.new_context(viewport=dict(width=width, height=height))
        self.context.route('**/colab-badge.svg', lambda r: r.fulfill(content_type='image/svg+xml', body='<svg xmlns="http://www.w3.org/2000/svg"/>'))   # the one picture from the net
        self.page = self.context.new_page()
        self.page.on('console', lambda m: m.type=='error' and self.errors.append(m.text))
        self.page.on('pageerror', lambda e: self.errors.append(str(e)))
        self.page.on('dialog', lambda d: d.accept())

    def open(self, name):
        self.page.goto(f'{self.address}/lab/tree/{name}?token={self.token}&reset')
        self.page.wait_for_selector('.jp-Notebook .jp-Cell', timeout=300_000)
        self.wait_idle()
        self.page.keyboard.press('Control+b') if self.page.locator('.jp-SideBar .lm-mod-current').count() else None
        return self

    def theme(self, name):
        "'Light' or 'Dark', by the Settings menu as a user would."
        self.menu('Settings', 'Theme', f'JupyterLab {name}')
        until(lambda: self.page.evaluate('document.body.dataset.jpThemeLight')==('true' if name=='Light' else 'false'), what=f'the theme is {name}')

    def menu(self, *path):
        self.page.locator('.lm-MenuBar-item', has_text=path[0]).first.click()
        for label in path[1:]:
            item = self.page.locator('.lm-Menu-item', has=self.page.locator('.lm-Menu-itemLabel', has_text=re.compile(f'^{re.escape(label)}$'))).last
            item.hover()
            if label==path[-1]: item.click()
            else: self.page.wait_for_timeout(300)

    def run_all(self):
        prompts = self.page.locator('.jp-Notebook .jp-InputPrompt')
        started = lambda: any(t.strip('[]: \xa0') for t in prompts.all_inner_texts())
        for _ in range(3):  # a kernel that has only just connected may let the first request fall
            self.menu('Run', 'Run All Cells')
            try: return until(started, 10, 'a cell runs')
            except AssertionError: pass
        raise AssertionError('Run All Cells ran nothing')

    def save(self):
        self.menu('File', 'Save Notebook')
        self.page.wait_for_selector('.lm-TabBar-tab.lm-mod-current:not(.jp-mod-dirty)')

    def cell(self, i): return self.page.locator('.jp-Notebook .jp-Cell').nth(i)

    def run_cell(self, i, code, seconds=300):
        "Replace cell i's text, run it, wait for its output; returns (output's text, seconds it took)."
        editor = self.cell(i).locator('.cm-content')
        editor.click()
        self.page.keyboard.press('Control+a')
        self.page.keyboard.insert_text(code)
        before = self.cell(i).locator('.jp-InputPrompt').inner_text()
        start = time.monotonic()
        self.page.keyboard.press('Control+Enter')
        def done():
            prompt = self.cell(i).locator('.jp-InputPrompt').inner_text()
            return prompt!=before and re.search(r'\d', prompt)
        while not done():
            assert time.monotonic()-start < seconds, f'{code!r} has not answered after {seconds} s'
            self.page.wait_for_timeout(20)
        return self.cell(i).locator('.jp-OutputArea-output').all_inner_texts(), time.monotonic()-start

    def wait_idle(self, seconds=300):
        "The kernel has been idle for a second: its first 'idle' comes before the page has connected."
        quiet = lambda: self.page.locator('.jp-Notebook-ExecutionIndicator[data-status=idle]').count()
        def steady():
            for _ in range(10):
                if not quiet(): return False
                self.page.wait_for_timeout(100)
            return True
        until(steady, seconds, 'the kernel is idle')

    def artifact(self, name):
        ARTIFACTS.mkdir(exist_ok=True)
        return ARTIFACTS/f'{name}.png'

    def screenshot(self, name, of='.lnb'):
        path = self.artifact(name)
        target = self.page.locator(of).first
        target.scroll_into_view_if_needed()
        self.page.wait_for_timeout(400)
        target.screenshot(path=path)
        return path

    def shut_down(self):
        "End every kernel of the server, so that one test's run does not slow the next."
        api = self.context.request
        for k in api.get(f'{self.address}/api/kernels?token={self.token}').json():
            api.delete(f"{self.address}/api/kernels/{k['id']}", headers=dict(Authorization=f'token {self.token}'))

    def close(self): self.context.close()


@contextmanager
def running(folder, home, name, *cells, **size):
    "A Lab (of `size` pixels) with a notebook of `cells` open, in a JupyterLab and a browser of its own; Run All is pressed."
    notebook(Path(folder)/f'{name}.ipynb', *cells)
    with jupyterlab(folder, home) as at, chromium() as b:
        lab = Lab(b, at, **size)
        lab.folder = Path(folder)
        lab.open(f'{name}.ipynb').run_all()
        yield lab
        lab.shut_down()
        lab.close()


class LivePage:
    "What a person sees of a LiveRun: `.lnb` number `i` of the page."
    def __init__(self, lab, i=0): self.lab, self.box = lab, lab.page.locator('.lnb').nth(i)

    def appear(self, seconds=300):
        self.box.wait_for(timeout=seconds*1000)
        until(lambda: self.box.locator('.js-plotly-plot .main-svg').count()>=5, seconds, 'five plots')
        return self

    def text(self): return self.box.inner_text()
    def state(self): return self.box.locator('[role=status]').inner_text()
    def step(self): return int(re.search(r'step ([\d,]+) of', self.text())[1].replace(',', ''))
    def plot(self, name): return self.box.locator('.js-plotly-plot').nth(('loss', 'rates', 'spectrum', 'matrices', 'memory').index(name))
    def points(self, plot='loss', trace=0): return self.plot(plot).evaluate('(el, t) => Array.from(el.data[t].y ?? [])', trace)
    def press(self, name): self.box.get_by_role('button', name=name).click()
    def press_and_see(self, name, state, seconds=300):
        self.press(name)
        until(lambda: state in self.state(), seconds, f'{state} after {name}')
