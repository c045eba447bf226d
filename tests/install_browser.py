"Make sure that a Chromium is here for the browser tests: one on the PATH, Debian's package, or playwright's own."
import os, shutil, subprocess, sys


def chromium(): return next((p for p in map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome')) if p), None)


def install():
    if shutil.which('apt-get') and os.geteuid() == 0:
        subprocess.run(['apt-get', 'update', '-q'], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(['apt-get', 'install', '-y', '-q', 'chromium'], check=True, stdout=subprocess.DEVNULL)
    else: subprocess.run([sys.executable, '-m', 'playwright', 'install', 'chromium'], check=True)


if __name__ == '__main__' and not chromium(): install()
